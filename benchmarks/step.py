"""Cost of the configuration-aware model: a training step, all U, an adapter on disk, a store of 100 of them.

Steps with theta and steps of Shared-LoRA alternate on two models over the same batch and configurations, so that noise
hits both alike; medians are compared. Random weights in the published shapes; `benchmarks.gpu` has larger models.

    python -m benchmarks.step [--quick]
    python -m benchmarks.step --count     the operations that a step dispatches beyond the base's, on any machine
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks._models import adapt, batch, build, build_small, layers_of, seconds
from benchmarks._operations import beyond_the_base
from benchmarks._report import report
from coalora.adapt.effective import fold
from coalora.adapt.theta import ConfigurationAwareModel
from coalora.models.loading import default_device
from coalora.quant.space import ChoiceSpace
from coalora.recipes import AdapterRecipe

SPACE = ChoiceSpace("nf")


def steps(name: str, device: torch.device, rounds: int) -> list[dict]:
    """A step with theta against a step of Shared-LoRA, forward, backward and AdamW, switching left out."""
    inputs, run = batch(name, device), {}
    rank = 16 if device.type == "cpu" else 64
    for method in ("coa", "shared"):
        model = adapt(build(name, device), SPACE, method, rank, cache_bytes=0)
        C = np.random.default_rng(0).integers(len(SPACE), size=len(model.layers))
        model.switch(C)
        optimizer = torch.optim.AdamW(model.named_parameters().values(), lr=1e-4)

        def step(model=model, C=C, optimizer=optimizer) -> None:  # type: ignore[no-untyped-def]
            model.switch(C)  # the weights are there: what it costs is theta
            model.peft_model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        step()
        run[method] = step
    times = [[seconds(run[method], device) for method in ("coa", "shared")] for _ in range(rounds)]
    coa, shared = (median(column) for column in zip(*times, strict=True))
    row = {"what": f"step with theta / Shared-LoRA, {name}, r={rank}", "measured": coa / shared, "limit": 1.05}
    return [row | {"unit": "x", "note": f"{coa * 1e3:.1f} and {shared * 1e3:.1f} ms"}]


def adjustments(name: str, device: torch.device, r: int = 64) -> dict:
    """All U of a model in one call, without gradients."""
    layers = layers_of(name)
    theta = ConfigurationAwareModel(SPACE, layers, r).to(device)
    C = torch.zeros(len(layers), dtype=torch.int64, device=device)
    with torch.no_grad():
        theta(C)
        cost = median(seconds(lambda: theta(C), device) for _ in range(20))
    return {"what": f"all {len(layers)} U of {name}, r={r}", "measured": cost * 1e6, "limit": None, "unit": "us"}


def adapter_on_disk(name: str, device: torch.device, r: int = 64) -> list[dict]:
    """A new configuration to a bf16 adapter on disk: theta, folding, writing; and what 100 of them would take."""
    layers = layers_of(name)
    theta = ConfigurationAwareModel(SPACE, layers, r).to(device)
    pairs = [(torch.randn(r, x.shape[1], device=device), torch.randn(x.shape[0], r, device=device)) for x in layers]
    random = np.random.default_rng(0)

    def write(folder: Path) -> None:
        C = torch.as_tensor(random.integers(len(SPACE), size=len(layers)), device=device)
        with torch.no_grad():
            tensors = {}
            for layer, (A, B), U in zip(layers, pairs, theta(C).unbind(), strict=True):
                tensors[f"{layer.name}.lora_A.weight"] = fold(A, U).bfloat16().cpu()
                tensors[f"{layer.name}.lora_B.weight"] = B.bfloat16().cpu()
        save_file(tensors, folder / "adapter_model.safetensors")

    with tempfile.TemporaryDirectory() as folder:
        cost = median(seconds(lambda: write(Path(folder)), device) for _ in range(3))
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
        # A store of 100 keeps the shared pair and theta once, and of each configuration its indices: the rest follows.
        bundle = {
            f"{i}.{n}": t.bfloat16().cpu() for i, pair in enumerate(pairs) for n, t in zip("AB", pair, strict=True)
        }
        bundle |= {f"theta.{n}": p.detach().bfloat16().cpu() for n, p in theta.named_parameters()}
        bundle["configurations"] = torch.zeros((100, len(layers)), dtype=torch.int16)
        save_file(bundle, Path(folder) / "bundle.safetensors")
        stored = (Path(folder) / "bundle.safetensors").stat().st_size
    row = {"what": f"new configuration to adapter on disk, {name}", "measured": cost, "limit": 1.0, "unit": "s"}
    store = {
        "what": f"100 configurations with their adapters, {name}",
        "measured": stored / 1e6,
        "limit": 60,
        "unit": "MB",
    }
    return [row | {"note": f"{size / 1e6:.1f} MB"}, store | {"note": "beside the base"}]


def counts() -> list[dict]:
    """Dispatched operations beyond the base's for each target layer, forward and backward, views left out."""
    rows = []
    recipes = {"Shared-LoRA": ("shared", 0), "theta": ("coa", 0), "theta and experts": ("coa", 3)}
    for name in ("RoBERTa-large", "SmolLM2-135M", "Qwen2.5-1.5B"):
        for what, (method, bits) in recipes.items():
            recipe = AdapterRecipe(r=4, theta="all", compensation_rank=0, expert_bits=bits, expert_start="zero")
            n, beyond = beyond_the_base(partial(build_small, name), SPACE, method, recipe)
            most = ", ".join(f"{count} {op.split('.')[1]}" for op, count in beyond.most_common(3))
            row = {"model": name, "adapter": what, "layers": n, "operations": sum(beyond.values())}
            rows.append(row | {"a layer": sum(beyond.values()) / n, "limit": 7, "most of them": most})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--count", action="store_true", help="count dispatched operations instead of timing them")
    given = parser.parse_args()
    if given.count:
        report("step-count", counts())
        return
    rounds = 7 if given.quick else 40
    device = default_device()
    rows = [*steps("MiniLM-L6", device, rounds), adjustments("RoBERTa-large", device)]
    report("step", rows + adapter_on_disk("RoBERTa-large", device))


if __name__ == "__main__":
    main()
