"""Share of quantization's cost that each method wins back, at equal cost, over seeds.

    python -m benchmarks.recovery pydoc [--seeds 3] [--steps 200] [--methods shared ours ...] [--mlflow sqlite:///FILE]
    python -m benchmarks.recovery tinyshakespeare --text FILE
    python -m benchmarks.recovery pydoc --choices all    (432 choices a layer in place of one for each bit-width)

Cost is counted in forward passes of one block or example: a training step is 3 a block (forward, backward), with a
teacher 4; measuring a configuration is one for each search example. An adapter for one configuration alone takes S
steps. A method that serves all configurations may spend 4 S such steps, a search of two rounds included
(`SEARCH_MEASUREMENTS`), so that a step with a teacher leaves fewer of them. All see the same examples in the same order
and are measured on the same configurations: the allocations at the asked budgets.

Every run is kept in benchmarks/.cache by its settings, and an interrupted benchmark goes on behind its last run. A run
that other code made than there is now is used as well, and named: delete it where the change matters.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import get_args

import numpy as np

import coalora
from benchmarks._report import report
from benchmarks._settings import CACHE, SPACES, Setting, prepare
from coalora.adapt.adapted import AdaptedModel
from coalora.evaluate.losses import measure_configurations
from coalora.files import digest, file_sha256, json_bytes, read_json, replace_file
from coalora.recipes import AdapterRecipe, Objective, Rounding, TrainingRecipe
from coalora.search.knapsack import allocate
from coalora.train.loop import train

BUDGETS = (2.25, 2.5, 3.0, 4.0, 5.0)
SINGLE_RUNS = 4  # what the one run for all configurations may cost, in runs for one
SEARCH_MEASUREMENTS = 64  # two rounds: 24 members and 8 candidates each


@dataclass(frozen=True)
class Arm:
    """A compared method: how it adapts and how it trains. `single`: one run for each budget's configuration."""

    method: str = "coa"
    adapter: Mapping[str, int | str] = field(default_factory=dict)
    training: Mapping[str, object] = field(default_factory=dict)
    objective: Mapping[str, object] = field(default_factory=dict)
    single: bool = False


# An arm says what it adds to the shared pair.
_SHARED_ALONE: dict[str, int | str] = {
    "r": 16, "lora_alpha": 16, "theta": "all", "compensation_rank": 0, "expert_bits": 0, "expert_start": "zero",
}  # fmt: skip
_HALF = {"distillation": 0.5}
_EXPERTS: dict[str, int | str] = {"expert_bits": 3, "expert_start": "auto"}
_COMPENSATED: dict[str, int | str] = {"expert_bits": 3, "expert_start": "compensation"}
# The rows of docs/results.md by their names there: B is ours with theta on all choices.
ARMS: dict[str, Arm] = {
    "none": Arm("none"),
    "shared": Arm("shared"),
    "shared, uniform": Arm("shared", training={"sampling": "uniform"}),
    "shared + distillation": Arm("shared", objective=_HALF),
    "paper": Arm("paper", training={"sampling": "uniform"}),
    "theta": Arm("coa"),
    "theta at ten times its learning rate": Arm("coa", training={"theta_lr": 3e-3}),
    "theta + compensation": Arm("coa", {"compensation_rank": 8}),
    "compensation": Arm("coa", {"compensation_rank": 8, "theta": "none"}),
    "experts": Arm("coa", {"expert_bits": 3}),
    "experts + compensation": Arm("coa", {"expert_bits": 3, "compensation_rank": 8}),
    "experts from compensation": Arm("coa", _COMPENSATED),
    "experts from compensation without theta": Arm("coa", {**_COMPENSATED, "theta": "none"}),
    "ours": Arm("coa", {**_EXPERTS, "theta": "others"}, objective=_HALF),
    "B": Arm("coa", _EXPERTS, objective=_HALF),
    "B without theta": Arm("coa", {**_EXPERTS, "theta": "none"}, objective=_HALF),
    "B, theta at ten times its learning rate": Arm("coa", _EXPERTS, {"theta_lr": 3e-3}, _HALF),
    "B, rank 8": Arm("coa", {**_EXPERTS, "r": 8, "lora_alpha": 8}, objective=_HALF),
    "B, rank 32": Arm("coa", {**_EXPERTS, "r": 32, "lora_alpha": 32}, objective=_HALF),
    "B, scale 2": Arm("coa", {**_EXPERTS, "lora_alpha": 32}, objective=_HALF),
    "B, adaptive": Arm("coa", _EXPERTS, {"sampling": "adaptive", "sampling_power": 2.0}, _HALF),
    "B, sandwich": Arm("coa", _EXPERTS, {"sampling": "sandwich"}, _HALF),
    "B, uniform": Arm("coa", _EXPERTS, {"sampling": "uniform"}, _HALF),
    "B, experts for all bits": Arm("coa", {**_EXPERTS, "expert_bits": 8}, objective=_HALF),
    "B, experts for all bits, uniform": Arm("coa", {**_EXPERTS, "expert_bits": 8}, {"sampling": "uniform"}, _HALF),
    "one LoRA each": Arm("shared", single=True),
    "one LoRA each + distillation": Arm("shared", objective=_HALF, single=True),
    "one LQ-LoRA each": Arm("lq-lora", single=True),
}
MAIN = ("none", "shared", "shared + distillation", "paper", "ours", "one LoRA each")


def steps_for(arm: Arm, setting: Setting, single_steps: int) -> int:
    """Steps that the arm's share of the cost pays for."""
    a_step = setting.batch_size * (4 if arm.objective else 3)
    cost = single_steps * setting.batch_size * 3
    if not arm.single:
        cost = SINGLE_RUNS * cost - SEARCH_MEASUREMENTS * len(setting.benchmark.search)
    return cost // a_step


def run(arm: Arm, setting: Setting, seed: int, single_steps: int) -> dict[str, list[float]]:
    """Validation loss and metric at every budget, from the cache where this very run has been made before."""
    key = digest([asdict(arm), setting.identity, seed, single_steps, BUDGETS])[:20]
    file = CACHE / f"recovery-{key}.json"
    if not file.is_file():
        parts = (_single if arm.single else _together)(arm, setting, seed, steps_for(arm, setting, single_steps))
        replace_file(file, json_bytes({"code": code_digest(), **parts}))
    kept = read_json(file)
    if kept.pop("code", None) != code_digest():
        print(f"made by other code: {file.name}", flush=True)
    return kept


@cache
def code_digest() -> str:
    """Of the sources that decide what a run comes to."""
    folder = Path(coalora.__file__).parent
    parts = ("adapt", "models", "quant", "train")
    return digest([file_sha256(file) for part in parts for file in sorted((folder / part).glob("*.py"))])[:12]


def _together(arm: Arm, setting: Setting, seed: int, steps: int) -> dict[str, list[float]]:
    tables = setting.tables
    low, high = tables.bits_range()
    asked = allocate(tables.err, tables.bits, BUDGETS)
    spread = allocate(tables.err, tables.bits, np.maximum(np.linspace(low, high, 24), low))
    members = np.unique(np.concatenate([asked, spread]), axis=0)
    adapted = _adapted(arm, setting, seed)
    if adapted.named_parameters() and arm.method != "none":
        train(
            adapted, setting.benchmark.train, members, tables.average_bits(members),
            _recipe(arm, setting), steps=steps, total_steps=steps, seed=seed,
        )  # fmt: skip
    return _measured(adapted, setting, asked)


def _single(arm: Arm, setting: Setting, seed: int, steps: int) -> dict[str, list[float]]:
    tables, found = setting.tables, []
    for configuration in allocate(tables.err, tables.bits, BUDGETS)[:, None]:
        adapted = _adapted(arm, setting, seed)
        if arm.method == "lq-lora":
            adapted.start_from_compensation(configuration[0])
        train(
            adapted, setting.benchmark.train, configuration, tables.average_bits(configuration),
            _recipe(arm, setting), steps=steps, total_steps=steps, seed=seed,
        )  # fmt: skip
        found.append(_measured(adapted, setting, configuration))
    return {part: [value for one in found for value in one[part]] for part in found[0]}


def _adapted(arm: Arm, setting: Setting, seed: int) -> AdaptedModel:
    return AdaptedModel(
        setting.load(),
        setting.tables.layers,
        setting.tables.space,
        setting.benchmark.task,
        method=arm.method,
        recipe=AdapterRecipe(**{**_SHARED_ALONE, **arm.adapter}),  # type: ignore[arg-type]
        seed=seed,
        statistics=setting.statistics,
    )


def _recipe(arm: Arm, setting: Setting) -> TrainingRecipe:
    recipe = TrainingRecipe(
        batch_size=setting.batch_size,
        lr=setting.lr,
        theta_lr=setting.theta_lr,
        head_lr=setting.lr,
        objective=Objective(**{"teacher": setting.teacher, **arm.objective}),  # type: ignore[arg-type]
    )
    return replace(recipe, **arm.training)  # type: ignore[arg-type]


def _measured(adapted: AdaptedModel, setting: Setting, configurations: np.ndarray) -> dict[str, list[float]]:
    scores = measure_configurations(adapted, setting.benchmark.validation, configurations, batch_size=64)
    return {"loss": [s.loss for s in scores], "metric": [s.metric for s in scores]}


def gap_closed(runs: Mapping[str, np.ndarray], low: str, high: str, ours: str) -> np.ndarray:
    """Share (seeds, budgets) of the way from `low` to `high` that `ours` goes; NaN where there is no way to go."""
    way = runs[low] - runs[high]
    return np.where(way > 0, (runs[low] - runs[ours]) / np.where(way > 0, way, 1), np.nan)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery", description=__doc__.splitlines()[0])
    parser.add_argument("setting", choices=["pydoc", "tinyshakespeare", "sst2"])
    parser.add_argument("--text", type=Path, help="text of tinyshakespeare, or folder of SST-2's train and dev.tsv")
    parser.add_argument("--model", help="folder or hub id of the encoder of sst2")
    parser.add_argument("--choices", choices=list(SPACES), default="bits", help="one for each bit-width, or all 432")
    parser.add_argument("--rounding", choices=get_args(Rounding), default="feedback", help="how weights are quantized")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200, help="S: steps of an adapter for one configuration alone")
    parser.add_argument("--methods", nargs="+", default=MAIN, choices=list(ARMS), metavar="METHOD")
    parser.add_argument("--mlflow", help="tracking URI: every run is logged there")
    options = parser.parse_args(arguments)
    setting = prepare(options.setting, options.text, options.model, options.choices, options.rounding)
    trained = [name for name in options.methods if ARMS[name].method != "none"]
    if short := [name for name in trained if steps_for(ARMS[name], setting, options.steps) < 1]:
        parser.error(f"--steps {options.steps} must be larger: search alone costs what {', '.join(short)} may spend")
    where = options.setting if options.choices == "bits" else f"{options.setting}-{options.choices}"
    found: dict[str, dict[str, np.ndarray]] = {}
    for name in options.methods:
        runs = []
        for seed in range(options.seeds):
            runs.append(run(ARMS[name], setting, seed, options.steps))
            shown = " ".join(f"{value:.4f}" for value in runs[-1]["metric"])
            print(f"{where}, {name}, seed {seed}: {shown}", flush=True)
            if options.mlflow:
                _log(options.mlflow, where, name, seed, steps_for(ARMS[name], setting, options.steps), runs[-1])
        found[name] = {part: np.array([one[part] for one in runs]) for part in ("loss", "metric")}
    rows: list[dict] = []
    for name in options.methods:
        values = found[name]["metric"]
        cells = {
            f"{b:g}": f"{m:.4f} ± {s:.4f}" for b, m, s in zip(BUDGETS, values.mean(0), _spread(values), strict=True)
        }
        rows.append({"method": name, "steps": steps_for(ARMS[name], setting, options.steps), **cells})
    for low in ("shared", "shared + distillation"):
        if {low, "ours", "one LoRA each"} <= set(found):
            closed = gap_closed({k: v["loss"] for k, v in found.items()}, low, "one LoRA each", "ours")
            mean = {f"{b:g}": f"{value:.0%}" for b, value in zip(BUDGETS, np.nanmean(closed, axis=0), strict=True)}
            rows.append({"method": f"gap closed in loss, from {low}", "steps": None, **mean})
    full = setting.full_precision()
    metric = "bits per byte" if setting.benchmark.task == "language-modeling" else "accuracy"
    note = f"{metric} ± standard deviation over {options.seeds} seeds; full precision, no adapter: {full:.4f}"
    report(f"recovery-{where}", rows, notes=note)


def _spread(values: np.ndarray) -> np.ndarray:
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])


def _log(uri: str, setting: str, name: str, seed: int, steps: int, measured: Mapping[str, list[float]]) -> None:
    import mlflow

    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment(f"recovery-{setting}")
    arm = ARMS[name]
    with mlflow.start_run(run_name=f"{name}, seed {seed}"):
        mlflow.log_params(
            {"method": name, "seed": seed, "steps": steps, **arm.adapter, **arm.training, **arm.objective}
        )
        for part, values in measured.items():
            mlflow.log_metrics({f"{part}_{budget:g}": value for budget, value in zip(BUDGETS, values, strict=True)})


if __name__ == "__main__":
    main()
