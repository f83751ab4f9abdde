"""Exports in the engines of devices: agreement with the adapted model in memory, and predicted against measured loss.

    PYTHONPATH=.venv/engines:.venv/gptq python -m benchmarks.engines --text FILE [--model FOLDER] [--quick]

Without --model a Llama decoder of 13.6 M parameters (rows of 512 and 1,536: multiples of 256, which all types of GGUF
need) is pre-trained on the text first. For each scheme of a format one training answers three budgets, each by its
allocation, which uses it whole; each pair is written by `export_for` and run by its engine. 20 further budgets are
predicted from the losses of training (search blocks) and measured on blocks that nothing has seen.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._report import report
from coalora import ChoiceSpace, CoaLoraConfig, CoaLoraModel, export_for
from coalora.calibrate.tables import CalibrationTables
from coalora.configurations import configuration_dict
from coalora.data.text import read_text
from coalora.evaluate.losses import LossMeter
from coalora.export.engines import ENGINES, log_probabilities
from coalora.files import write_json
from coalora.recipes import CalibrationRecipe, PretrainRecipe, SearchRecipe, Tie, TrainingRecipe
from coalora.search.knapsack import allocate
from coalora.train.pretrain import pretrain

LENGTH = 128
SPACES: dict[tuple[str, ...], tuple[ChoiceSpace, Tie]] = {
    ("gguf",): (ChoiceSpace("gguf", type=["Q2_K", "IQ3_XXS", "IQ4_XS", "Q6_K"]), "none"),
    ("compressed-tensors", "mlx", "gptq"): (
        ChoiceSpace("int", bits=[2, 3, 4, 8], group_size=[64], mode=["sym"]), "fused",
    ),
}  # fmt: skip
ROWS_OF_576 = ChoiceSpace("gguf", type=["Q2_K", "IQ3_XXS", "IQ4_XS", "Q6_K", "Q4_0", "Q5_0", "Q8_0"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="UTF-8; nine tenths train, the rest measure")
    parser.add_argument("--model", type=Path, help="a saved language model")
    parser.add_argument("--quick", action="store_true", help="a smaller decoder and fewer steps")
    parser.add_argument("--tokens", type=int, default=48, help="of the text, after each of which engines are compared")
    given = parser.parse_args()
    text = read_text(given.text)
    cut = len(text) * 9 // 10
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.model or _decoder([text[:cut]], Path(scratch) / "model", quick=given.quick)
        rows, predicted = [], []
        for formats, (space, tie) in SPACES.items():
            model = _trained(folder, space, tie, text[:cut], quick=given.quick)
            held_out = _split(model, text[cut:], 24)
            bundle = model.bundle()
            low, high = bundle.tables.cost_range()
            for budget in (low + 0.15 * (high - low), low + 0.4 * (high - low), low + 0.7 * (high - low)):
                out, named = Path(scratch) / f"{formats[0]}-{budget:.2f}", Path(scratch) / "configuration.json"
                write_json(named, configuration_dict(_allocation(bundle.tables, budget), bundle.tables))
                began = time.process_time()
                made = export_for(bundle, out, configuration=named, formats=["peft", "packed", *formats], base=folder)
                wrote = time.process_time() - began
                ids = held_out.input_ids[0, : given.tokens].tolist()
                memory = log_probabilities(out, "packed", ids)
                for name in formats:
                    if not ENGINES[name].installed:
                        rows.append({"format": name, "engine": f"{ENGINES[name].package} is not installed"})
                        continue
                    rows.append(_row(name, made.adapted.average_bits, out, ids, memory, wrote))
                    print(rows[-1], flush=True)
            predicted.append(_prediction(model, formats[0], held_out))
        report("engines", rows, notes=f"log-probabilities after {given.tokens} tokens of unseen text")
        report("predicted", predicted, notes="loss of 20 unseen budgets: nats a token on unseen blocks")


def _allocation(tables: CalibrationTables, budget: float) -> np.ndarray:
    groups = allocate(tables.search_err, tables.search_cost, [budget], allowed=tables.search_allowed)
    return np.asarray(tables.expand(groups)[0])


def _row(name: str, bits: float, out: Path, ids: Sequence[int], memory: torch.Tensor, wrote: float) -> dict[str, Any]:
    found = log_probabilities(out, name, ids)
    apart = (found - memory).abs()
    target = torch.tensor(ids[1:])
    losses = [float(-p[:-1].gather(1, target[:, None]).mean()) for p in (memory, found)]
    return {
        "format": name,
        "engine": ENGINES[name].package,
        "bits": bits,
        "mean": float(apart.mean()),
        "most": float(apart.max()),
        "same top token": float((found.argmax(-1) == memory.argmax(-1)).float().mean()),
        "loss in memory": losses[0],
        "loss in engine": losses[1],
        "CPU s to write all": wrote,
    }


def _prediction(model: CoaLoraModel, name: str, held_out: Any) -> dict[str, Any]:
    """How far losses that training measured are from those on unseen blocks, after one common shift."""
    bundle, tables = model.bundle(), model.tables
    low, high = tables.cost_range()
    meter = LossMeter(model.adapted, held_out, 8)
    asked = np.linspace(low, high, 22)[1:-1]
    chosen = [bundle.select(float(budget)) for budget in asked]
    told = np.array([bundle.loss_of(C) or np.nan for C in chosen])
    measured = meter(np.stack(chosen), "unseen budgets")
    known = np.isfinite(told)
    shift = float(np.mean(measured[known] - told[known]))
    errors = np.abs(told[known] + shift - measured[known])
    return {
        "space": name,
        "budgets": len(asked),
        "measured in training": int(known.sum()),
        "shift": shift,
        "mean error": float(errors.mean()),
        "most": float(errors.max()),
        "range of losses": float(np.ptp(measured)),
    }


def _decoder(texts: list[str], folder: Path, *, quick: bool) -> Path:
    recipe = PretrainRecipe(
        hidden_size=256 if quick else 512, intermediate_size=768 if quick else 1536,
        num_hidden_layers=2 if quick else 4, num_attention_heads=8, vocab_size=1024 if quick else 2048,
        max_length=LENGTH, steps=60 if quick else 400, batch_size=8, lr=1e-3,
    )  # fmt: skip
    folder.mkdir(parents=True)
    pretrain(texts, recipe, folder, seed=0, device=torch.device("cpu"))
    return folder


def _trained(folder: Path, space: ChoiceSpace, tie: Tie, text: str, *, quick: bool) -> CoaLoraModel:
    config = CoaLoraConfig(
        r=8, choices=space, tie=tie, calibration=CalibrationRecipe(n_samples=16),
        training=TrainingRecipe(batch_size=4, lr=1e-3), search=SearchRecipe(rounds=1, candidates=4, batch_size=8),
    )  # fmt: skip
    model = CoaLoraModel.from_pretrained(folder, config, max_length=LENGTH)
    if not space.fits([layer.shape for layer in model.layers]).any(1).all() and space.scheme_name == "gguf":
        model.config = replace(config, choices=ROWS_OF_576)
    train = _split(model, text, 512)
    model.calibrate(train)
    model.fit(train, _split(model, text[len(text) * 4 // 5 :], 24), steps=12 if quick else 60)
    return model


def _split(model: CoaLoraModel, text: str, n: int) -> Any:
    return model.split([text]).apart(n)


if __name__ == "__main__":
    main()
