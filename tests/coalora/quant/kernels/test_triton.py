"""The Triton kernels against the plain torch path, bit for bit: on a GPU where there is one, else interpreted.

The interpreter takes what the compiler refuses, and rounds every operation: so the kernels are compiled here as well,
which needs no GPU, and looked through for instructions that round otherwise.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from coalora.quant.kernels.available import use_triton

CASES = [
    str(Path(__file__).with_name(name))
    for name in ("nf_triton_cases.py", "int_triton_cases.py", "switch_triton_cases.py")
]
TABLE = {"table": "*i64", "columns": "i32"}
KERNELS = [
    ("nf", "_dequantize", {"books": "*fp32"}, {"GROUPS": 256}),
    ("nf", "_exact_scales", {}, {"TILE": 2048}),
    ("nf", "_quantize_scales", {}, {"ROWS": 8}),
    ("nf", "_quantize", {"books": "*fp32", "thresholds": "*fp32"}, {"GROUPS": 256}),
    ("integer", "_dequantize", {}, {"GROUPS": 256}),
    ("integer", "_quantize", {}, {"TILE": 2048}),
    ("integer", "_encode", {}, {"GROUPS": 256}),
]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def run(interpret: str) -> subprocess.CompletedProcess[str]:
    # In a process of its own: Triton reads the variable when it is imported, and others may have imported it already.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", *CASES]
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[4], check=False
    )


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="the compiled kernels are tested on the GPU")
def test_interpreted_kernels_equal_the_plain_path() -> None:
    finished = run("1")
    assert finished.returncode == 0, finished.stdout[-4000:]


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="awaits a GPU")
def test_compiled_kernels_equal_the_plain_path() -> None:
    finished = run("0")
    assert finished.returncode == 0, finished.stdout[-4000:]


@needs_triton
@pytest.mark.parametrize(("module", "name", "pointers", "constants"), KERNELS)
def test_kernels_compile_for_a_gpu_to_instructions_that_round_like_the_plain_path(
    module: str, name: str, pointers: dict[str, str], constants: dict[str, int]
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if "constexprs" not in inspect.signature(ASTSource).parameters:
        pytest.skip("before 3.3 Triton's compiler takes other arguments")
    kernel = getattr(import_module(f"coalora.quant.{module}.triton"), name)
    signature = {**TABLE, **pointers, **dict.fromkeys(constants, "constexpr")}
    fixed = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
    text = compiled.asm["ptx"]
    assert "st.global" in text
    assert set(re.findall(r"\bdiv\.\S*f32", text)) <= {"div.rn.f32"}
    assert not re.search(r"\bfma\.\S*f32|\.ftz|\.approx", text)


def test_tensors_on_a_cpu_take_the_plain_path() -> None:
    assert not use_triton(torch.zeros(1))
