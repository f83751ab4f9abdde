"""Share of quantization's cost that each method wins back, at equal cost, over seeds.

    python -m benchmarks.recovery pydoc [--seeds 3] [--steps 200] [--methods shared ours ...] [--mlflow sqlite:///FILE]
    python -m benchmarks.recovery tinyshakespeare --text FILE
    python -m benchmarks.recovery pydoc-to-tinyshakespeare --text FILE    (pre-trained on one text, adapted to another)
    python -m benchmarks.recovery sst2 --text FOLDER --model FOLDER
    python -m benchmarks.recovery smollm2 --model FOLDER --train FILE --test FILE [--size cpu | gpu] --seeds 1
    python -m benchmarks.recovery pydoc --choices all    (432 choices a layer in place of one for each bit-width)

Cost is counted in forward passes of one block or example: a training step is 3 a block (forward, backward), with a
teacher 4; measuring a configuration is one for each search example. An adapter for one configuration alone takes S
steps. A method that serves all configurations may spend 4 S such steps, the search included (`Size.searches`
configurations), so that a step with a teacher leaves fewer of them. All see the same examples in the same order
and are measured on the same configurations: the allocations at the asked budgets. Of text, KL divergence and top-1
agreement are those beside the base in full precision: what to recover asks for, and of little meaning to fine-tune.

Sizes of smollm2, five methods and five budgets: `cpu` (S = 60 steps of 4 x 128 tokens, 64 blocks measured) takes two
free cores about an hour, `gpu` (S = 50 steps of 8 x 512 tokens, 96 blocks measured) one H100 about four minutes.

Every run is kept in benchmarks/.cache by its settings, and an interrupted benchmark goes on in the middle of its last
one. A run that other code made than there is now is used as well, and named: delete it where the change matters.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import get_args

import numpy as np

import coalora
from benchmarks._report import report
from benchmarks._settings import CACHE, SIZES, SPACES, TEXTS, Setting, prepare
from coalora.adapt.adapted import AdaptedModel
from coalora.evaluate.losses import measure_configurations
from coalora.evaluate.reference import Reference
from coalora.files import digest, file_sha256, json_bytes, read_json, replace_file
from coalora.models.switching.quantized import FULL_PRECISION
from coalora.recipes import AdapterRecipe, Goal, Objective, Rounding, TrainingRecipe
from coalora.search.knapsack import allocate
from coalora.train.checkpoint import Checkpoints
from coalora.train.loop import train

BUDGETS = (2.25, 2.5, 3.0, 4.0, 6.0)
SINGLE_RUNS = 4  # what the one run for all configurations may cost, in runs for one
Measured = dict[str, list[float]]  # loss and metrics by name, at every budget


@dataclass(frozen=True)
class Arm:
    """A compared method: how it adapts and how it trains, where not by the defaults for its goal. `single`: one run for
    each budget's configuration."""

    method: str = "coa"
    adapter: Mapping[str, object] = field(default_factory=dict)
    training: Mapping[str, object] = field(default_factory=dict)
    objective: Mapping[str, object] = field(default_factory=dict)
    single: bool = False
    goal: Goal = "fine-tune"


_RILQ = {"distillation": 0.5, "outputs": 0.0, "hidden": 1.0, "states": "last"}  # arXiv 2412.01129
# The rows of docs/results.md by their names there.
ARMS: dict[str, Arm] = {
    "none": Arm("none"),
    "shared": Arm("shared"),
    "ours": Arm(),
    "one LoRA each": Arm("shared", single=True),
    "one LQ-LoRA each": Arm("lq-lora", single=True),
    "shared, recover": Arm("shared", goal="recover"),
    "ours, recover": Arm(goal="recover"),
    "one LoRA each, recover": Arm("shared", single=True, goal="recover"),
    # What ours is made of.
    "paper": Arm("paper", training={"sampling": "uniform"}),
    "shared, uniform": Arm("shared", training={"sampling": "uniform"}),
    "ours, uniform": Arm(training={"sampling": "uniform"}),
    "ours, without theta": Arm(adapter={"theta": "none"}),
    "ours, without pairs": Arm(adapter={"expert_bits": 0}),
    "ours, pairs from zero": Arm(adapter={"expert_start": "zero"}),
    "ours, pairs for all bits": Arm(adapter={"expert_bits": 8}),
    "ours, half distillation": Arm(objective={"distillation": 0.5}),
    "ours, half distillation from the base": Arm(objective={"distillation": 0.5, "teacher": "base"}),
    "shared, half distillation": Arm("shared", objective={"distillation": 0.5}),
    # Levers.
    "cascaded ranks": Arm(adapter={"expert_bits": 0, "leading_ranks": 8}),
    "cascaded ranks, twice as many": Arm(adapter={"expert_bits": 0, "r": 32, "lora_alpha": 32, "leading_ranks": 16}),
    "ours, one configuration a step": Arm(training={"paired": False}),
    "shared, one configuration a step": Arm("shared", training={"paired": False}),
    "ours, low bits first": Arm(training={"sampling": "low-bits-first"}),
    "ours, lr rising with bits": Arm(training={"lr_by_bits": 1.0}),
    "ours, lr falling with bits": Arm(training={"lr_by_bits": -1.0}),
    "ours, half last hidden state": Arm(objective=_RILQ),
    "ours, half last hidden state of the base": Arm(objective={**_RILQ, "teacher": "base"}),
    "ours, ranks by layer": Arm(adapter={"rank_pattern": {"*.[qk]_proj": 8, "*.down_proj": 24}}),
    # Of classifiers.
    "theta + compensation": Arm("coa", {"compensation_rank": 8}),
    "compensation": Arm("coa", {"compensation_rank": 8, "theta": "none"}),
    "experts": Arm("coa", {"compensation_rank": 0, "expert_bits": 3, "theta": "all"}),
}
MAIN = ("none", "shared, one configuration a step", "ours", "one LoRA each")
RECOVER = ("shared, recover", "ours, recover")


def steps_for(arm: Arm, setting: Setting, single_steps: int) -> int:
    """Steps that the arm's share of the cost pays for."""
    size = setting.size
    distilled = Objective(**arm.objective).resolved(arm.goal).distillation  # type: ignore[arg-type]
    cost = single_steps * size.batch_size * 3
    if not arm.single:
        cost = SINGLE_RUNS * cost - size.searches * len(setting.benchmark.search)
    return cost // (size.batch_size * (4 if distilled else 3))


def run(arm: Arm, setting: Setting, seed: int, single_steps: int) -> Measured:
    """Losses and metrics at every budget."""
    tables, steps = setting.tables, steps_for(arm, setting, single_steps)
    asked = allocate(tables.err, tables.bits, BUDGETS)
    if not arm.single:
        low, high = tables.bits_range()
        spread = allocate(tables.err, tables.bits, np.maximum(np.linspace(low, high, 24), low))
        return _kept(arm, setting, seed, steps, np.unique(np.concatenate([asked, spread]), axis=0), asked)
    found = [_kept(arm, setting, seed, steps, configuration, configuration) for configuration in asked[:, None]]
    return {part: [value for one in found for value in one[part]] for part in found[0]}


def _kept(arm: Arm, setting: Setting, seed: int, steps: int, members: np.ndarray, asked: np.ndarray) -> Measured:
    """`_run`, from the cache where this very run has been made before; one that broke off goes on."""
    key = digest([asdict(arm), setting.identity, seed, steps, members.tolist(), asked.tolist()])[:20]
    file, begun = CACHE / f"recovery-{key}.json", CACHE / f"recovery-{key}"
    if not file.is_file():
        found = _run(arm, setting, seed, steps, members, asked, Checkpoints(begun, notify=print))
        replace_file(file, json_bytes({"code": code_digest(), **found}))
        shutil.rmtree(begun, ignore_errors=True)
    kept = read_json(file)
    if kept.pop("code", None) != code_digest():
        print(f"made by other code: {file.name}", flush=True)
    return kept


def _run(
    arm: Arm, setting: Setting, seed: int, steps: int, members: np.ndarray, asked: np.ndarray, begun: Checkpoints
) -> Measured:
    """Train over `members` (n, N), and measure `asked` (m, N)."""
    size, tables = setting.size, setting.tables
    adapted = AdaptedModel(
        setting.load(), tables.layers, tables.space, setting.benchmark.task, method=arm.method,
        recipe=AdapterRecipe(**arm.adapter), seed=seed, statistics=setting.statistics,  # type: ignore[arg-type]
        cache_bytes=1 << 29,
    )  # fmt: skip
    if arm.method == "lq-lora":
        adapted.start_from_compensation(members[0])
    if adapted.named_parameters() and arm.method != "none":
        recipe = TrainingRecipe(
            batch_size=size.batch_size, lr=size.lr, head_lr=size.lr, warmup_steps=min(20, steps // 10),
            objective=Objective(**arm.objective),  # type: ignore[arg-type]
        ).resolved(arm.goal, setting.benchmark.task)  # fmt: skip
        train(
            adapted, setting.benchmark.train, members, tables.average_bits(members),
            replace(recipe, **arm.training), steps=steps, total_steps=steps, seed=seed, checkpoints=begun,  # type: ignore[arg-type]
        )  # fmt: skip
    return _measured(adapted, setting, asked)


def _measured(adapted: AdaptedModel, setting: Setting, asked: np.ndarray) -> Measured:
    found = measure_configurations(
        adapted, setting.benchmark.validation, asked, batch_size=max(1, 8192 // setting.size.length),
        reference=Reference() if adapted.is_language_model else None,
    )  # fmt: skip
    return {"loss": [s.loss for s in found]} | {name: [s.metrics[name] for s in found] for name in found[0].metrics}


def full_precision(setting: Setting) -> Measured:
    """Scores of the base without quantization and adapter."""
    base = np.full((1, len(setting.tables.layers)), FULL_PRECISION)
    return _kept(ARMS["none"], setting, 0, 0, base, base)


@cache
def code_digest() -> str:
    """Of the sources that decide what a run comes to."""
    folder = Path(coalora.__file__).parent
    parts = ("adapt", "models", "quant", "train")
    return digest([file_sha256(file) for part in parts for file in sorted((folder / part).glob("*.py"))])[:12]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("setting", choices=[*TEXTS, "sst2", "smollm2"])
    parser.add_argument("--text", type=Path, help="tinyshakespeare, or folder of SST-2's train and dev.tsv")
    parser.add_argument("--model", help="folder or hub id of the model of sst2 or smollm2")
    parser.add_argument("--train", type=Path, help="text that smollm2 is adapted to")
    parser.add_argument("--test", type=Path, help="text that smollm2 is measured on")
    parser.add_argument("--size", choices=["cpu", "gpu"], default="cpu", help="of smollm2")
    parser.add_argument("--choices", choices=list(SPACES), default="bits", help="one for each bit-width, or all 432")
    parser.add_argument("--rounding", choices=get_args(Rounding), default="feedback", help="how weights are quantized")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="S: steps of an adapter for one configuration alone")
    parser.add_argument("--batch", type=int, help="blocks or examples a step")
    parser.add_argument("--validation", type=int, help="blocks or examples that are measured")
    parser.add_argument("--methods", nargs="+", choices=list(ARMS), metavar="METHOD")
    parser.add_argument("--mlflow", help="tracking URI: every run is logged there")
    options = parser.parse_args(arguments)
    size = SIZES[options.size if options.setting == "smollm2" else "decoder" if options.setting in TEXTS else "sst2"]
    given = {"steps": options.steps, "batch_size": options.batch, "validation": options.validation}
    size = replace(size, **{name: value for name, value in given.items() if value})
    files = {part: getattr(options, part) for part in ("text", "train", "test")}
    setting = prepare(options.setting, files, options.model, size, options.choices, options.rounding)
    methods = options.methods or [*MAIN, *(RECOVER if options.setting == "smollm2" else ())]
    trained = [name for name in methods if ARMS[name].method != "none"]
    if short := [name for name in trained if steps_for(ARMS[name], setting, size.steps) < 1]:
        parser.error(f"--steps {size.steps} is too small: search alone costs what {', '.join(short)} may spend")
    where = options.setting if options.choices == "bits" else f"{options.setting}-{options.choices}"
    full = full_precision(setting)
    rows: list[dict] = []
    for name in methods:
        arm, runs = ARMS[name], []
        steps = steps_for(arm, setting, size.steps)
        for seed in range(1 if arm.method == "none" else options.seeds):
            runs.append(run(arm, setting, seed, size.steps))
            print(f"{where}, {name}, seed {seed}: {runs[-1]}", flush=True)
            if options.mlflow:
                _log(options.mlflow, where, name, seed, steps, runs[-1])
        for part in runs[0]:
            values = np.array([one[part] for one in runs])
            spread = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(len(BUDGETS))
            cells = [f"{mean:.4f} ± {deviation:.4f}" for mean, deviation in zip(values.mean(0), spread, strict=True)]
            found = dict(zip(map("{:g}".format, BUDGETS), cells, strict=True))
            rows.append({"measure": part, "method": name, "steps": steps, **found})
    bits = setting.tables.average_bits(allocate(setting.tables.err, setting.tables.bits, BUDGETS))
    notes = f"mean ± standard deviation over {options.seeds} seeds; {size}; stored bits {np.round(bits, 3).tolist()}; "
    notes += f"base in full precision: {', '.join(f'{part} {values[0]:.4f}' for part, values in full.items())}"
    report(f"recovery-{where}", sorted(rows, key=lambda row: str(row["measure"])), notes=notes)


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
