"""The Triton kernels against the plain torch path, bit for bit: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from coalora.kernels.available import use_triton

CASES = Path(__file__).with_name("nf_triton_cases.py")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def run(interpret: str) -> subprocess.CompletedProcess[str]:
    # In a process of its own: Triton reads the variable when it is imported, and others may have imported it already.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--noconftest", str(CASES)]
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=CASES.parents[3], check=False)


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


def test_tensors_on_a_cpu_take_the_plain_path() -> None:
    assert not use_triton(torch.zeros(1))
