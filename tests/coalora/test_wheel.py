"""The built wheel does the whole method by itself: installed alone, with the pipeline's packages out of reach."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.flows.test_imports import ORCHESTRATION, PIPELINE_ONLY

ROOT = Path(__file__).parents[2]
BLOCKED = (*ORCHESTRATION, *PIPELINE_ONLY, "pipeline", "tasks", "flows", "infra", "sklearn", "bitsandbytes", "botorch")
PROGRAM = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None  # importing it raises
texts = [f"text {{i}}: the quick brown fox jumps over the lazy dog, and a small model reads it" for i in range(24)]
train, search = texts[:16], texts[16:]

from coalora import ChoiceSpace, CoaLoraConfig, CoaLoraModel, load_adapted

space = ChoiceSpace("nf", bits=[2, 3, 4], scale_bits=[8], scale_dtype=["bf16"], block_size=[32, 64])
model = CoaLoraModel.from_pretrained("base", CoaLoraConfig(r=4, choices=space), max_length=16)
model.calibrate(train)
model.fit(train, search, steps=8, rounds=1)
model.switch(budget=3.5)
batch = model.tokenizer("a text", return_tensors="pt")
print("logits", tuple(model(**batch).logits.shape))
model.save_pretrained("out")
adapted = CoaLoraModel.load_bundle("out").adapt(budget=3.5)
adapted.save_pretrained("adapter")
model.export("device", budget=3.5)
device = load_adapted("device/base", "device/adapter")
print("device", bool((device(**batch).logits - model(**batch).logits).abs().max() < 1e-4))

import coalora
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

peft_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "adapter")
loaded = peft_model.get_base_model().model.layers[0].self_attn.q_proj.lora_A["default"].weight
key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
print("peft", torch.equal(loaded, adapted.tensors[key]), adapted.average_bits <= 3.5)
print("from", coalora.__file__)

from importlib import import_module
from pkgutil import walk_packages

names = [module.name for module in walk_packages(coalora.__path__, "coalora.")]
# Triton comes with CUDA builds of torch; only these need it, and only tensors on a GPU ask for them.
names = [name for name in names if not name.endswith((".triton", ".jobs", "quant.kernels.packed", "__main__"))]
for name in names:
    import_module(name)
print("modules", len(names))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed in it and nothing else."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "coalora", source / "coalora", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    alone = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "wheel", *alone, "--wheel-dir", str(source / "dist"), str(source)], check=True)
    (wheel,) = (source / "dist").glob("coalora-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)], check=True)
    return site


def test_fifteen_lines_do_the_whole_method_and_every_module_is_importable(
    site: Path, tiny_llama, tiny_tokenizer, tmp_path: Path
) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM.format(blocked=BLOCKED)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert said["logits"].endswith("320)")
    assert said["device"] == "True"
    assert said["peft"] == "True True"
    assert said["from"].startswith(str(site))
    assert int(said["modules"]) > 40


@pytest.mark.parametrize("place", ["a folder", "a checkout"])
@pytest.mark.parametrize("command", [["run", "demo"], ["prune"], ["pool"]])
def test_a_command_of_the_pipeline_names_the_extra_that_it_needs(
    site: Path, tmp_path: Path, place: str, command: list[str]
) -> None:
    if place == "a checkout":
        for name in ("pipeline", "tasks", "flows", "infra", "coalora", "pipelines.yaml"):
            (tmp_path / name).symlink_to(ROOT / name)
    blocked = [name for name in BLOCKED if not (ROOT / name).is_dir()]
    program = f"import sys\nfor name in {blocked!r}:\n    sys.modules[name] = None\n"
    done = subprocess.run(
        [sys.executable, "-P", "-c", f"{program}from coalora.cli import main\nsys.exit(main({command!r}))"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "PATH": os.environ["PATH"], "PREFECT_API_URL": "http://127.0.0.1:9/api"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr[-3000:]
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert "pip install 'coalora[pipeline]'" in done.stderr


def test_the_wheel_carries_types_and_every_module(site: Path) -> None:
    assert (site / "coalora" / "py.typed").is_file()
    sources = {p.relative_to(ROOT) for p in (ROOT / "coalora").rglob("*.py")}
    assert {p.relative_to(site) for p in (site / "coalora").rglob("*.py")} == sources
