"""Loss of a language model whose target layers are all quantized alike, without any adapter: quantizers compared.

The first blocks of a text are scored, and the model is calibrated on the first blocks of another (or, without one, on
those that follow). Every row has the stored bits a weight and the seconds of processor time that quantizing took.
Rows of gptqmodel and of llama.cpp's types appear where the packages are installed (extras `gptq` and `gguf`), the
latter where the rows of all layers divide into their blocks. The widths of llama.cpp's types are those of their names.

    python -m benchmarks.quantizers MODEL --text FILE [--calibration FILE] [--bits 2 3 4] [--layers down_proj]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks._report import report
from coalora.calibrate.statistics import collect_statistics
from coalora.data.benchmark import IGNORED, Split
from coalora.data.build import text_split
from coalora.data.text import read_text
from coalora.errors import CoaloraError
from coalora.models.loading import default_device, load_model, load_tokenizer
from coalora.models.targets import TargetLayer, find_target_layers
from coalora.quant.registry import get_scheme
from coalora.quant.scheme import Choice, InputStatistics, Scheme
from coalora.quant.space import ChoiceSpace

Quantize = Callable[[Tensor, InputStatistics], tuple[Tensor, int]]  # weight (out, in): quantized, and its stored bytes


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quantizers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="folder or hub id of a language model")
    parser.add_argument("--text", required=True, help="text to score, which calibration does not see")
    parser.add_argument("--calibration", help="text to calibrate on; by default what follows the scored blocks")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--group", type=int, default=64, help="weights that share a scale")
    parser.add_argument("--length", type=int, default=512, help="tokens a block")
    parser.add_argument("--blocks", type=int, default=4, help="blocks that are scored")
    parser.add_argument("--samples", type=int, default=16, help="blocks that are calibrated on")
    parser.add_argument(
        "--layers", help="suffix or glob of the layers that are quantized; by default all target layers"
    )
    options = parser.parse_args(arguments)
    device = default_device()
    model = load_model(options.model, "language-modeling", device=device, dtype=torch.float32)
    tokenizer = load_tokenizer(options.model)

    def blocks(path: str, count: int) -> Split:
        return text_split([read_text(path)], tokenizer, max_length=options.length, limit=count)

    scored = blocks(options.text, options.blocks + (0 if options.calibration else options.samples))
    if options.calibration:
        calibration = blocks(options.calibration, options.samples)
    else:
        after = slice(options.blocks, None)
        calibration = replace(scored, input_ids=scored.input_ids[after], lengths=scored.lengths[after])
        scored = scored.head(options.blocks)
    layers = find_target_layers(model, None if options.layers is None else [options.layers])
    statistics = collect_statistics(model, layers, calibration, batch_size=1, hessians=True)
    n_weights = sum(layer.n_weights for layer in layers)
    masters = [layer.matrix(model.get_submodule(layer.name).get_parameter("weight")).clone() for layer in layers]
    rows: list[dict] = [{"quantizer": "full precision", "bits": 32.0, "loss": loss(model, scored)}]
    for name, quantize in quantizers(options.bits, options.group, [layer.shape for layer in layers]):
        start, stored = time.process_time(), 0
        for layer, master, known in zip(layers, masters, statistics, strict=True):
            result, nbytes = quantize(master, known)
            stored += nbytes
            write(model, layer, result)
        seconds = time.process_time() - start
        rows.append(
            {"quantizer": name, "bits": 8 * stored / n_weights, "loss": loss(model, scored), "processor s": seconds}
        )
        print(rows[-1], flush=True)
    report(
        "quantizers",
        rows,
        notes=f"{options.model}; loss in nats a token over {options.blocks} x {options.length} tokens of "
        f"{options.text}, calibrated on {options.samples} x {options.length} of "
        f"{options.calibration or 'what follows'}; {options.layers or 'all target layers'}; {device}",
    )


def quantizers(bits: Sequence[int], group: int, shapes: Sequence[tuple[int, int]]) -> Iterator[tuple[str, Quantize]]:
    """Name and quantizer of every row that layers of these shapes can take."""
    fields: dict[str, dict] = {
        "nf": {"scale_bits": [8], "scale_dtype": ["bf16"], "block_size": [group], "scale_block_size": [256]},
        "int": {"group_size": [group]},
        "gptq": {"group_size": [group]},
        "gguf": {},
    }
    labels = {"gptq": {"feedback": "gptqmodel"}, "gguf": {"absmax": "llama.cpp", "searched": "llama.cpp, importance"}}
    for name, values in fields.items():
        scheme = get_scheme(name)
        try:
            scheme.require_packages()
        except CoaloraError as error:
            print(error)
            continue
        space = ChoiceSpace(name, **values)
        fits = np.asarray(space.fits(shapes).all(0))
        for choice in (c for c, fit in zip(space.choices, fits, strict=True) if fit and c.width in bits):
            for rounding in ("feedback",) if name == "gptq" else ("absmax", "searched", "feedback"):
                yield f"{choice} {labels.get(name, {}).get(rounding, rounding)}", _own(scheme, choice, rounding)


def _own(scheme: Scheme, choice: Choice, rounding: str) -> Quantize:
    def quantize(weight: Tensor, known: InputStatistics) -> tuple[Tensor, int]:
        known = replace(known, rounding=rounding)  # type: ignore[arg-type]
        packed = scheme.quantize_packed(weight, choice, known)
        restored = scheme.dequantize(scheme.unpack(packed, choice, weight.shape), choice, weight.shape)
        return restored, sum(tensor.nbytes for tensor in packed.values())

    return quantize


@torch.no_grad()
def write(model: PreTrainedModel, layer: TargetLayer, weight: Tensor) -> None:
    """Put a weight (out, in) into its layer."""
    layer.matrix(model.get_submodule(layer.name).get_parameter("weight").data).copy_(weight)


@torch.no_grad()
def loss(model: PreTrainedModel, split: Split) -> float:
    """Mean negative log-likelihood of a token, in nats."""
    total, count = 0.0, 0
    for batch in split.batches(1, model.device):
        labels = batch.pop("labels")[:, 1:].flatten()
        logits = model(**batch).logits[:, :-1].flatten(0, 1).float()
        total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"))
        count += int((labels != IGNORED).sum())
    return total / count


if __name__ == "__main__":
    main()
