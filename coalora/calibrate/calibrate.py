"""Calibration of a base model: part by part, the statistics of layers' inputs, and the error of every choice.

A part is some transformer blocks (`coalora.calibrate.blocks`), or the whole model where the Hessians of all its layers
take little memory. Its layers are measured, quantized under every choice, and put away: with a checkpoint folder on
disk, from which a call that broke off goes on with the next part, and from which files are mapped back into memory.

The inputs of a block are those of the base model, or those that reach it through the quantized blocks before it, as in
GPTQ (arXiv 2210.17323). Which configuration a block will find before it is not known here: the layers before it stand
at the smallest of their choices, whose errors are the largest that it can meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from coalora.calibrate.blocks import BlockWise, Part
from coalora.calibrate.statistics import InputSums, inputs_of, load_statistics, save_statistics
from coalora.calibrate.tables import CalibrationTables, calibration_tables, counted, error_table
from coalora.data.benchmark import Split
from coalora.errors import CoaloraError
from coalora.files import digest, read_tensors, to_disk, whole_or_nothing, write_tensors
from coalora.models.choices import fitting
from coalora.models.targets import TargetLayer
from coalora.quant.scheme import InputStatistics
from coalora.quant.space import ChoiceSpace
from coalora.recipes import CalibrationRecipe, Tie

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ERRORS, _HIDDEN = "errors.safetensors", "hidden.safetensors"


def calibrate(
    model: nn.Module,
    layers: Sequence[TargetLayer],
    split: Split,
    space: ChoiceSpace,
    recipe: CalibrationRecipe,
    *,
    base_digest: str,
    allowed: np.ndarray | None = None,
    rest_dtype: torch.dtype | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tie: Tie = "none",
    device: torch.device | None = None,
    checkpoint_dir: Path | None = None,
    progress: Callable[[str], Callable[[int, int], None]] | None = None,
) -> tuple[CalibrationTables, list[InputStatistics]]:
    """Tables and input statistics of a base model's target layers (N), over examples at equal distances in `split`.

    Args:
        model: the base model in full precision, before PEFT wraps it.
        base_digest: identity of its weights (`coalora.models.files.model_digest`).
        allowed: bool (N, K), the choices that a layer may take; None allows all that fit its shape.
        rest_dtype: of the other tensors where an export holds them in a smaller type (`write_base`).
        tokenizer: the base's; its files are counted among what a device holds.
        tie: which layers take one choice.
        device: where parts are computed, one at a time; None: where the model is.
        checkpoint_dir: where parts that are done are kept, for the same call to go on from; whoever names it removes
            it, when the statistics are no longer read.
        progress: makes a listener (done, total) for what is named.

    Raises:
        CoaloraError: fewer examples than `recipe.n_samples`; a layer that no example reaches; more to keep than
            `recipe.kept_mb`; blocks that cannot be told apart.
    """
    if recipe.n_samples > len(split):
        raise CoaloraError(
            f"calibration asks for {recipe.n_samples} examples, and there are {len(split)}",
            remedy="Lower calibration.n_samples",
        )
    examples, allowed = split.apart(recipe.n_samples), fitting(layers, space, allowed)
    kept = check_kept(layers, space, recipe, allowed)
    keep = (recipe.rounding != "absmax" or space.needs_statistics) and kept <= recipe.kept_mb
    hessians = recipe.hessians or recipe.rounding == "feedback" or space.needs_statistics
    device = device or next(model.parameters()).device
    walk = BlockWise(
        model,
        layers,
        lambda: inputs_of(examples, recipe.batch_size, device),
        device,
        most=recipe.hessians_mb * 10**6 if hessians else None,
        single=recipe.inputs == "quantized",
    )
    several = len(walk.parts) > 1

    def measure(part: Part, own: list[TargetLayer], last: bool) -> tuple[list[InputStatistics], np.ndarray]:
        """Statistics and errors of a part's layers; leaves what the part puts out in `walk.hidden`."""
        quantized, of_layers = recipe.inputs == "quantized", list(part.layers)
        told = progress if progress and not several else None
        with InputSums(model, own, device, hessians=hessians) as sums:
            walk.run(part, sums.telling(told and told("input statistics"), len(examples)), keep=not (last or quantized))
        known = [replace(one, rounding=recipe.rounding) for one in sums.statistics()]
        weights = [layer.matrix(model.get_submodule(layer.name).get_parameter("weight")) for layer in own]
        errors = error_table(
            [weight.to(device) for weight in weights],
            known,
            space,
            allowed=allowed[of_layers],
            keep=keep,
            progress=told and told(f"quantizing {len(own)} layers under {len(space)} choices"),
        )
        if quantized and not last:
            with _holding(weights, known, space, stand_ins(own, space, allowed[of_layers])):
                walk.run(part, keep=True)
        if keep and not recipe.hessians:  # they have served
            known = [replace(one, hessian=None) for one in known]
        return known, errors

    saved: _Saved | None = None
    if checkpoint_dir is not None and several:
        what = [recipe.to_dict(), [layer.to_dict() for layer in layers], space.to_dict(), allowed.tolist()]
        read = [str(next(model.parameters()).dtype), examples.input_ids.tolist(), examples.lengths.tolist()]
        saved = _Saved(checkpoint_dir, digest([base_digest, what, read])[:16], space)
    err, statistics = np.zeros(allowed.shape), dict[int, InputStatistics]()
    done = saved.parts_done(len(walk.parts)) if saved else 0
    told = progress(f"calibrating {len(walk.parts)} parts of {len(layers)} layers") if progress and several else None
    for number, part in enumerate(walk.parts):
        own = [layers[i] for i in part.layers]
        if saved and number == done > 0:
            walk.hidden = saved.hidden(number - 1)
        if number >= done:
            known, errors = measure(part, own, number + 1 == len(walk.parts))
            if saved:
                saved.put(number, own, known, errors, walk.hidden)
        if saved:
            known, errors = saved.get(number, own)
        err[list(part.layers)] = errors
        statistics |= zip(part.layers, known, strict=True)
        if told:
            told(number + 1, len(walk.parts))
    tables = calibration_tables(layers, space, err, base_digest, allowed, recipe.rounding, tie)
    return counted(tables, model, rest_dtype, tokenizer), [statistics[i] for i in range(len(layers))]


def stand_ins(layers: Sequence[TargetLayer], space: ChoiceSpace, allowed: np.ndarray) -> np.ndarray:
    """(n,): the choice that a layer takes while blocks behind it are calibrated with quantized inputs."""
    nbytes = np.where(allowed, space.packed_nbytes_table([layer.shape for layer in layers]), np.inf)
    return nbytes.argmin(1)


def check_kept(
    layers: Sequence[TargetLayer], space: ChoiceSpace, recipe: CalibrationRecipe, allowed: np.ndarray | None = None
) -> float:
    """Megabytes of all layers under all allowed choices, packed: what rounding other than absmax keeps.

    Raises:
        CoaloraError: they are to be kept, and exceed `recipe.kept_mb`.
    """
    nbytes = space.packed_nbytes_table([layer.shape for layer in layers])
    kept = float(nbytes[fitting(layers, space, allowed)].sum()) / 1e6
    if recipe.rounding != "absmax" and kept > recipe.kept_mb:
        raise CoaloraError(
            f"Rounding {recipe.rounding} keeps the weights of {len(layers)} layers under {len(space)} choices: "
            f"{kept:,.0f} MB, above calibration.kept_mb {recipe.kept_mb:,}",
            remedy="Allow fewer choices, raise calibration.kept_mb, or set calibration.rounding to absmax",
        )
    return kept


@contextmanager
@torch.no_grad()
def _holding(
    weights: Sequence[Tensor], statistics: Sequence[InputStatistics], space: ChoiceSpace, choices: np.ndarray
) -> Iterator[None]:
    """Within, the weights (n, each out x in) are quantized to `choices` (n,)."""
    masters = [weight.clone() for weight in weights]
    try:
        for weight, known, k in zip(weights, statistics, choices.tolist(), strict=True):
            weight.copy_(space.scheme_of(k).fake_quantize(weight, space.choices[k], known))
        yield
    finally:
        for weight, master in zip(weights, masters, strict=True):
            weight.copy_(master)


@dataclass(frozen=True)
class _Saved:
    """Parts that are done, in a folder each; a folder has its name when it is whole."""

    folder: Path
    key: str
    space: ChoiceSpace

    def parts_done(self, most: int) -> int:
        return next((number for number in range(most) if not self._part(number).is_dir()), most)

    def put(
        self,
        number: int,
        layers: Sequence[TargetLayer],
        statistics: Sequence[InputStatistics],
        errors: np.ndarray,
        hidden: Sequence[Tensor],
    ) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with whole_or_nothing(self._part(number)) as part:
            save_statistics(part, layers, statistics, self.space)
            write_tensors(part / _ERRORS, {"err": errors})
            write_tensors(part / _HIDDEN, {f"{n:09d}": tensor for n, tensor in enumerate(hidden)})
            for file in part.iterdir():
                to_disk(file)
        if number:
            (self._part(number - 1) / _HIDDEN).unlink(missing_ok=True)

    def get(self, number: int, layers: Sequence[TargetLayer]) -> tuple[list[InputStatistics], np.ndarray]:
        """What was put; its tensors are mapped into memory."""
        part = self._part(number)
        return load_statistics(part, layers, self.space), read_tensors(part / _ERRORS)[0]["err"].numpy()

    def hidden(self, number: int) -> list[Tensor]:
        tensors, _ = read_tensors(self._part(number) / _HIDDEN)
        return [tensors[name] for name in sorted(tensors)]

    def _part(self, number: int) -> Path:
        return self.folder / f"calibration-{self.key}-{number:04d}"
