"""Memory of the target layers in every mode, against the formulas of `coalora.models.switching.quantized`.

A decoder with random weights from a checkpoint on disk, three configurations, one training step each. Counted are the
bytes of the tensors that the target layers and their switch hold on the device. Measured is the peak of the anonymous
memory of a process for each mode (mapped files are not in it; RssAnon of Linux), or on a GPU, in this process,
`torch.cuda.max_memory_allocated`.

    python -m benchmarks.memory [--quick]
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks._report import report
from coalora.adapt.adapted import AdaptedModel
from coalora.cache import nbytes
from coalora.models.loading import default_device, default_dtype, load_model
from coalora.models.targets import find_target_layers
from coalora.quant.space import ChoiceSpace
from coalora.recipes import AdapterRecipe, MasterMode, WeightMode

CACHE = 8 << 20
MODES: list[tuple[WeightMode, MasterMode]] = [
    ("dequantized", "device"), ("dequantized", "cpu"), ("dequantized", "mmap"),
    ("packed", "device"), ("packed", "cpu"), ("packed", "mmap"),
]  # fmt: skip


def _anonymous() -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def run(checkpoint: Path, weights: WeightMode, master: MasterMode) -> dict:
    """One mode, in this process."""
    device = default_device()
    packed = weights == "packed"
    start = torch.device("cpu") if packed else device
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before, peak, stop = 0 if on_gpu else _anonymous(), [0], threading.Event()
    watch = threading.Thread(target=_watch, args=(peak, stop))
    if not on_gpu:
        watch.start()
    model = load_model(checkpoint, "language-modeling", device=start, dtype=default_dtype(device))
    layers = find_target_layers(model)
    adapted = AdaptedModel(
        model, layers, ChoiceSpace("nf"), "language-modeling", method="shared", recipe=AdapterRecipe(r=8), seed=0,
        cache_bytes=CACHE, master=master, weights=weights, checkpoint=checkpoint, device=device if packed else None,
    )  # fmt: skip
    ids = torch.arange(64, device=device).view(1, 64)
    for seed in range(3):
        adapted.switch(np.random.default_rng(seed).integers(432, size=len(layers)))
        adapted.peft_model(input_ids=ids, labels=ids).loss.backward()
    stop.set()
    if not on_gpu:
        watch.join()
    width = default_dtype(device).itemsize
    P, space = sum(layer.n_weights for layer in layers), adapted.base.space
    stored = sum(
        space.scheme.packed_nbytes(space.choices[k], layer.shape)
        for layer, k in zip(layers, adapted.base.configuration, strict=True)
    )
    own = [adapted.base.weight(i) for i in range(len(layers))] if not packed else []
    held = [tensor for tensor in [*own, *adapted.base.held()] if tensor.device.type == device.type]
    limit = (stored if packed else P * width) + CACHE
    limit += P * width if master == "device" or (master == "cpu" and device.type == "cpu") else 0
    limit += P // 4 + 64 * len(layers) if device.type == "cpu" else 0
    row = {"weights": weights, "master": master, "held MB": nbytes(held) / 1e6, "limit MB": limit / 1e6}
    row |= {"held / limit": nbytes(held) / limit, "target layers MB": P * width / 1e6}
    if on_gpu:
        return row | {"peak of the GPU MB": torch.cuda.max_memory_allocated() / 1e6}
    return row | {"peak RSS (own) MB": (peak[0] - before) / 1e6}


def _watch(peak: list[int], stop: threading.Event) -> None:
    while not stop.is_set():
        peak[0] = max(peak[0], _anonymous())
        time.sleep(0.005)


def measure_all(*, hidden: int) -> list[dict]:
    """Every mode, on a decoder of 8 blocks."""
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=8, num_attention_heads=8, vocab_size=512
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
        for weights, master in MODES:
            if torch.cuda.is_available():
                rows.append(run(Path(folder), weights, master))
                gc.collect()
                continue
            command = [sys.executable, "-m", "benchmarks.memory", "--mode", folder, weights, master]
            finished = subprocess.run(command, capture_output=True, text=True, check=True)
            rows.append(json.loads(finished.stdout.splitlines()[-1]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model")
    parser.add_argument("--mode", nargs=3, metavar=("CHECKPOINT", "WEIGHTS", "MASTER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.mode:
        checkpoint, weights, master = arguments.mode
        print(json.dumps(run(Path(checkpoint), weights, master)))
        return
    rows = measure_all(hidden=512 if arguments.quick else 1024)
    notes = f"Cache limit {CACHE >> 20} MiB. Peaks hold the whole model, its activations and transients of one layer."
    report("memory", rows, notes=notes)


if __name__ == "__main__":
    main()
