"""Cost of switching the configuration, against a training step of the same model (limit on a CPU: 5 %).

A training set of 50 members, as the initial set is: every member takes for each layer one of the choices on the way
from 2.25 to 7.25 bits. Each round takes one step and one switch to a random member, alternately, so that noise hits
both alike; medians are compared. `benchmarks.gpu` has larger models, and the limits of a card's memory.

    python -m benchmarks.switch [--quick] [--scheme int]
"""

from __future__ import annotations

import argparse
from functools import partial
from statistics import median

import numpy as np
import torch

from benchmarks._models import adapt, batch, build, seconds
from benchmarks._report import report
from coalora.models.loading import default_device
from coalora.quant.space import ChoiceSpace


def training_set(space: ChoiceSpace, n_layers: int, size: int = 50, per_layer: int = 12) -> np.ndarray:
    """(size, N): along rising budgets each layer climbs through `per_layer` choices of its own."""
    random = np.random.default_rng(0)
    order = np.argsort(space.nominal_bits, kind="stable")
    order = order[(space.nominal_bits[order] >= 2.25) & (space.nominal_bits[order] <= 7.3)]
    ladders = [np.sort(random.choice(len(order), per_layer, replace=False)) for _ in range(n_layers)]
    places = np.clip(np.linspace(0, per_layer - 1, size)[:, None] + random.normal(0, 1, (size, n_layers)), 0, None)
    steps = np.minimum(places.round().astype(int), per_layer - 1)
    return np.stack([order[ladder[steps[:, i]]] for i, ladder in enumerate(ladders)], axis=1)


def measure(name: str, scheme: str, device: torch.device, rounds: int, cache_mib: int) -> dict:
    space = ChoiceSpace(scheme)
    model = adapt(build(name, device), space, "shared", 16, cache_bytes=cache_mib << 20)
    members = training_set(space, len(model.layers))
    inputs = batch(name, device)
    for member in members if cache_mib else members[:1]:  # the cache as it is after one pass over the set
        model.base.switch(member)

    def step() -> None:
        model.peft_model(**inputs).loss.backward()
        for parameter in model.named_parameters().values():
            parameter.grad = None

    step()
    draws = np.random.default_rng(1).integers(len(members), size=rounds)
    times = [(seconds(step, device), seconds(partial(model.base.switch, members[k]), device)) for k in draws]
    of_step, of_switch = (median(column) for column in zip(*times, strict=True))
    row: dict = {"model": name, "scheme": scheme, "device": device.type}
    row |= {"cache MiB": cache_mib, "cached MiB": model.base.cache.nbytes / 2**20}
    row |= {"switch ms": of_switch * 1e3, "step ms": of_step * 1e3, "switch / step": of_switch / of_step, "limit": 0.05}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--scheme", choices=["nf", "int"], default="nf")
    given = parser.parse_args()
    rounds = 9 if given.quick else 60
    rows = [measure("MiniLM-L6", given.scheme, default_device(), rounds, cache) for cache in (0, 256, 512)]
    report("switch" if given.scheme == "nf" else f"switch-{given.scheme}", rows)


if __name__ == "__main__":
    main()
