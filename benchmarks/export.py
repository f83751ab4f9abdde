"""Exports against what they need: an adapter against its arithmetic and its bytes, a base against quantizing.

    python -m benchmarks.export [--quick]

RoBERTa-large's shapes at r = 64 for the adapter, all of whose layers theta adjusts, in processor time of one thread:
budget after budget from pairs that are all made (`Bundle.prepare`), beside making them; and one from none, the product
U A of every layer, beside one product of square matrices with as many FLOP. A folder on disk beside its bytes alone,
and beside these until the disk has them. A decoder of SmolLM2-135M's layers in every format of integers, beside
quantizing its weights and writing the files' bytes. Medians of paired measurements.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks._models import build, layers_of
from benchmarks._report import report
from coalora import Bundle, ChoiceSpace, ConfigurationSet
from coalora.adapt.theta import ConfigurationAwareModel
from coalora.calibrate.tables import calibration_tables
from coalora.export.base import packed_layers
from coalora.export.bundle import Adapted
from coalora.export.formats import EXPORT_FORMATS, ExportSource
from coalora.models.targets import TargetLayer, find_target_layers
from coalora.recipes import AdapterRecipe
from coalora.train.pretrain import train_tokenizer

R = 64
BYTES = "bytes"


def bundle_of(layers: list[TargetLayer], space: ChoiceSpace, r: int = R, cache_bytes: int = 0) -> Bundle:
    """A bundle of random pairs, whose theta moves every choice."""
    draw = torch.Generator().manual_seed(0)
    theta = ConfigurationAwareModel(space, layers, r).state_dict()
    tensors = {f"theta.{name}": torch.randn(t.shape, generator=draw) / 10 for name, t in theta.items()}
    for layer in layers:
        for side, shape in (("A", (r, layer.shape[1])), ("B", (layer.shape[0], r))):
            tensors[f"lora.{layer.name}.lora_{side}.weight"] = torch.randn(shape, generator=draw)
    err = np.repeat(4.0 ** -space.nominal_bits[None], len(layers), 0)
    tables = calibration_tables(layers, space, err, "0" * 64)
    C = np.repeat(np.arange(len(space))[:, None], len(layers), 1)
    members = ConfigurationSet(C, np.linspace(3, 2, len(space)), np.zeros(len(space), dtype=np.int64)).sorted(tables)
    recipe = AdapterRecipe(r=r, lora_alpha=r, theta="all", compensation_rank=0, expert_bits=0)
    return Bundle(
        tables, members, tensors, recipe, "language-modeling", base_model="some/base", cache_bytes=cache_bytes
    )


def paired(
    rounds: int, clock: Callable[[], float], *work: Callable[[], object], anew: Sequence[Path] = ()
) -> list[float]:
    """Median seconds of each of `work`, taken in turn; what it writes to `anew` is removed before.

    A file in place of another takes the pages that this had; on a virtual machine fresh ones can cost ten times that.
    """
    seconds: list[list[float]] = [[] for _ in work]
    for _ in range(rounds + 1):  # the first warms up
        for own, do in zip(seconds, work, strict=True):
            for path in anew:
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            started = clock()
            do()
            own.append(clock() - started)
    return [median(own[1:]) for own in seconds]


def written(folder: Path, *, durable: bool = False) -> Callable[[], None]:
    """Writes the bytes of a folder's files to another file, and waits for the disk if it is to be `durable`."""
    content = b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())

    def write() -> None:
        with (folder.parent / BYTES).open("wb") as file:
            file.write(content)
            if durable:
                os.fsync(file.fileno())

    return write


def adapters(rounds: int, scratch: Path) -> list[dict]:
    layers = layers_of("RoBERTa-large")
    space = ChoiceSpace("int", bits=[2, 3, 4], group_size=[64], mode=["sym"])
    bundle, prepared = bundle_of(layers, space), bundle_of(layers, space, cache_bytes=1 << 30)
    started = time.thread_time()
    prepared.prepare()
    preparing = time.thread_time() - started
    budgets = cycle(np.linspace(2.4, 3.9, 50))
    flop = sum(2 * R * R * layer.shape[1] for layer in layers)
    side = 1024
    square, out = torch.randn(side, side), torch.empty(side, side)

    def product() -> None:
        for _ in range(max(1, round(flop / (2 * side**3)))):
            torch.mm(square, square, out=out)

    again, own, plain = paired(
        rounds, time.thread_time, lambda: prepared.adapt(next(budgets)), lambda: bundle.adapt(3.3), product
    )
    done = max(1, round(flop / (2 * side**3))) * 2 * side**3
    rows = [
        {"what": "adapter in memory, any budget of a prepared bundle, one thread", "ms": 1e3 * again,
         "beside": "to prepare: all layers under all choices", "its ms": 1e3 * preparing, "ratio": again / preparing},
        {"what": f"adapter in memory, no pair made before, {flop / 1e9:.2f} GFLOP, one thread", "ms": 1e3 * own,
         "beside": f"a product of square matrices, {done / flop:.2f} of the FLOP", "its ms": 1e3 * plain,
         "ratio": own / plain * done / flop},
    ]  # fmt: skip
    adapted: Adapted = bundle.adapt(3.3)
    for dtype in (torch.float32, torch.float16):
        at = scratch / "adapter"
        adapted.save_pretrained(at, dtype=dtype)
        save = partial(adapted.save_pretrained, at, dtype=dtype)
        for durable, plainly in [(durable, written(at, durable=durable)) for durable in (False, True)]:
            own, plain = paired(rounds, time.perf_counter, save, plainly, anew=(at, scratch / BYTES))
            beside = "its bytes written" + (", until the disk has them" if durable else " to the page cache")
            what = f"adapter to disk, {str(dtype).removeprefix('torch.')}"
            rows.append({"what": what, "ms": 1e3 * own, "beside": beside, "its ms": 1e3 * plain, "ratio": own / plain})
    return rows


def bases(rounds: int, scratch: Path, blocks: int) -> list[dict]:
    model = build("SmolLM2-135M", torch.device("cpu"), blocks=blocks).eval()
    bundle = bundle_of(
        find_target_layers(model), ChoiceSpace("int", bits=[2, 3, 4], group_size=[64], mode=["sym"]), r=16
    )
    tokenizer = train_tokenizer(["a few words of a text, and some more of them"] * 9, 300)
    adapted = bundle.adapt(3.3)
    source = ExportSource(
        adapted, bundle.tables, bundle.task, model.config, load_model=lambda: model,
        load_tokenizer=lambda: tokenizer, load_statistics=lambda: None,
    )  # fmt: skip
    rows = []
    for name in ("packed", "compressed-tensors", "mlx", "gptq"):
        made = EXPORT_FORMATS[name]()
        folder = scratch / name
        export = partial(made.write, folder, source)
        export()
        bytes_alone = written(folder)

        def needed(bytes_alone: Callable[[], None] = bytes_alone) -> None:
            for _ in packed_layers(model, bundle.tables, adapted.choices):
                pass
            bytes_alone()

        own, plain = paired(rounds, time.perf_counter, export, needed, anew=(folder, scratch / BYTES))
        what, beside = f"base as {name}, {blocks} blocks", "quantized, and its bytes written"
        rows.append({"what": what, "ms": 1e3 * own, "beside": beside, "its ms": 1e3 * plain, "ratio": own / plain})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and a fifth of the blocks")
    given = parser.parse_args()
    rounds, blocks = (5, 6) if given.quick else (15, 30)
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        torch.set_num_threads(1)
        rows = adapters(rounds, Path(scratch))
        rows += bases(3 if given.quick else 5, Path(scratch), blocks)
    report("export", rows)


if __name__ == "__main__":
    main()
