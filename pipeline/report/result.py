"""Content of `result.json`: everything that a finished run reports, put together from what its stages measured."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from coalora.adapt.methods import METHODS
from coalora.calibrate.costs import budget_name
from coalora.calibrate.tables import CalibrationTables
from coalora.configurations import ConfigurationSet
from coalora.data.benchmark import Benchmark
from coalora.evaluate.compare import compare, guess_loss, normalization
from coalora.evaluate.metrics import KL, reported_metrics
from coalora.recipes import Goal
from pipeline.report.schema import Cost, Round, Step, as_result
from pipeline.settings.sections import Settings
from pipeline.store.artifacts import Artifact

_CEILINGS = {
    "base": "without an adapter",
    "shared": "with the Shared-LoRA adapter",
    "own": "with an adapter of its own, trained there for as many steps",
}
_REFERENCES = {False: "the base in full precision", True: "full precision with its own adapter"}
_OF_AN_EXPORT = ("digest", "adapter_bytes", "base_bytes")


@dataclass(frozen=True)
class RunMeasures:
    """What the stages of a run measured, each read from its artifact."""

    model: Mapping[str, Any]  # name, digest, vocab_size and n_parameters of the base
    data: Benchmark
    tables: CalibrationTables
    members: ConfigurationSet  # the final set
    chosen: np.ndarray  # configurations (n, N) of the n asked budgets
    scores: Mapping[str, Any]  # method -> losses and metrics of the members and budgets
    n_steps: Mapping[str, int]  # method -> its training steps
    references: Mapping[str, Sequence[Mapping[str, Any]]]  # method -> its score for each asked budget
    rounds: Sequence[Mapping[str, Any]]  # records of the search rounds, in order
    curves: Mapping[str, Sequence[Mapping[str, Any]]]  # method -> its training history
    harness: Sequence[Mapping[str, Any]]  # scores of tasks for each asked budget, where they are asked for
    continued: Sequence[Mapping[str, Any]]  # prompts and what follows them, where they are asked for
    ceiling: Mapping[str, Any] | None  # scores of an own adapter in full precision; None: those of an arm are taken
    exports: Sequence[Mapping[str, Any]]  # facts of each asked budget's export
    seconds: Iterable[tuple[str, float]]  # (stage, seconds) of every artifact


def time_of(artifact: Artifact) -> tuple[str, float]:
    """The stage that made an artifact, and its wall time with that of its shards."""
    seconds = sum(float(artifact.meta.get(name) or 0) for name in ("seconds", "shard_seconds"))
    return str(artifact.meta.get("stage", artifact.kind)), seconds


def build_result(pipeline: str, settings: Settings, run: RunMeasures) -> dict[str, Any]:
    """The content, checked against `pipeline.report.schema`."""
    data, measured, members, measures, alone = run.data, run.tables, run.members, run.scores, run.references
    bits = measured.average_bits(members.configurations)
    nbytes, costs = measured.total_nbytes(members.configurations), measured.costs(members.configurations)
    # What the search minimised (`searched_against`), so that training, search and report have one objective.
    searched = {m: s["members"] for m, s in measures.items()}
    losses = {m: s["metrics"][KL] if settings.goal == "recover" else s["loss"] for m, s in searched.items()}
    comparison = compare(
        {method: np.array(values) for method, values in losses.items()},
        costs,
        cost_range=measured.cost_range(),
        guess_loss=guess_loss(data.validation, data.num_labels or run.model["vocab_size"]),
    )
    asked, budgets = settings.benchmark, settings.evaluation.budgets
    reported = reported_metrics(data.task, data.num_labels, asked.metric, asked.metrics, goal=settings.goal)
    headline = reported[0]
    arm = "none" if settings.ceiling == "base" else "shared"
    ceiling = measures[arm]["full_precision"] if run.ceiling is None else run.ceiling
    content: dict[str, Any] = {
        "pipeline": pipeline,
        "benchmark": {
            "name": data.name,
            "task": data.task,
            "metric": headline.name,
            "higher_is_better": headline.higher_is_better,
            "n_validation": len(data.validation),
            "goal": settings.goal,
            "reference": None if data.task != "language-modeling" else _REFERENCES[settings.own_reference],
        },
        "model": {
            "name": run.model["name"],
            "n_layers": len(measured.layers),
            "n_weights": measured.n_weights,
            "n_parameters": run.model["n_parameters"],
            "digest": run.model["digest"],
        },
        "settings": settings.model_dump(mode="json"),
        "cost": Cost.of(measured.cost_kind).model_dump(),
        "full_precision": {
            "loss": ceiling["loss"],
            "metric": ceiling["metrics"][headline.name],
            "metrics": {m.name: ceiling["metrics"][m.name] for m in reported},
            "bits": 16.0 if settings.runtime.dtype == "bfloat16" else 32.0,
            "with_adapter": settings.ceiling != "base",
        },
        "arms": {method: {"label": _label(method, data.task), "n_steps": run.n_steps[method]} for method in measures},
        "references": {
            method: {"label": _label(method, data.task), "n_steps": alone[method][0]["steps"]} for method in alone
        },
        "budgets": [
            _budget(budget, configuration, export, i, measured, measures, [m.name for m in reported])
            | {"reference_metric": {m: rows[i]["metrics"][headline.name] for m, rows in alone.items()}}
            | {"reference_loss": {m: rows[i]["loss"] for m, rows in alone.items()}}
            for i, (budget, configuration, export) in enumerate(zip(budgets, run.chosen, run.exports, strict=True))
        ],
        "members": [
            {
                "average_bits": float(bits[i]),
                "cost": float(costs[i]),
                "nbytes": int(nbytes[i]),
                "round": int(members.joined[i]),
                "loss": {method: values[i] for method, values in losses.items()},
                "metric": {method: s["members"]["metrics"][headline.name][i] for method, s in measures.items()},
            }
            for i in range(len(members))
        ],
        "hypervolume": {
            "ref_point": comparison.ref_point,
            "ideal": comparison.ideal,
            "normalization": normalization(measured.cost_unit.words, settings.goal),
            "values": comparison.values,
        },
        "rounds": [Round.of_record(record).model_dump() for record in run.rounds],
        "curves": {m: [{key: step[key] for key in Step.model_fields} for step in of] for m, of in run.curves.items()},
        "heatmap": {
            "layers": [layer.name for layer in measured.layers],
            "kinds": [layer.kind for layer in measured.layers],
            "budgets": budgets,
            "bits": [_layer_bits(configuration, measured) for configuration in run.chosen],
        },
        "harness": [{"budget": b, "tasks": found} for b, found in zip(budgets, run.harness, strict=False)],
        "continued": [{"budget": settings.evaluation.prompts_at, **found} for found in run.continued],
        "seconds": _by_stage(run.seconds),
        "exports": [
            {"budget": b, "folder": f"export/{budget_name(b, measured.cost_kind)}"}
            | {key: e[key] for key in _OF_AN_EXPORT}
            for b, e in zip(budgets, run.exports, strict=True)
        ],
        "notes": _notes(data.task, list(measures), ceiling=settings.ceiling, goal=settings.goal)
        + noise(budgets, measures["coa"]["budgets"]["blocks"]),
    }
    return as_result(content).model_dump(mode="json")


def noise(budgets: Sequence[float], blocks: Sequence[Sequence[float]]) -> list[str]:
    """Sentences about neighbouring budgets whose losses by block (paired, one row a budget) differ by less than twice
    the standard error: another text might turn their order round."""
    found, order = [], np.argsort(budgets)
    for low, high in pairwise(order):
        difference = np.subtract(blocks[low], blocks[high])
        if len(difference) < 2 or not difference.any():
            continue  # no text, or one configuration
        gain, error = difference.mean(), difference.std(ddof=1) / len(difference) ** 0.5
        if abs(gain) < 2 * error:
            found.append(
                f"{budgets[high]:g} is {gain:.3f} ± {error:.3f} nats a token better than {budgets[low]:g} (CoA-LoRA, "
                f"standard error over {len(difference)} validation blocks): too little to tell them apart."
            )
    return found


def _budget(
    budget: float,
    configuration: np.ndarray,
    export: Mapping[str, Any],
    i: int,
    measured: CalibrationTables,
    measures: Mapping[str, Any],
    names: list[str],
) -> dict[str, Any]:
    metrics = {name: {method: s["budgets"]["metrics"][name][i] for method, s in measures.items()} for name in names}
    base_bytes, adapter_bytes = int(export["base_bytes"] or 0), int(export["adapter_bytes"] or 0)
    space = measured.space
    by_bits = Counter(space.choices[k].width or float(space.nominal_bits[k]) for k in configuration)
    return {
        "budget": budget,
        "average_bits": float(measured.average_bits(configuration)),
        "cost": float(measured.costs(configuration)),
        "base_bytes": base_bytes,
        "adapter_bytes": adapter_bytes,
        "total_bytes": base_bytes + adapter_bytes,
        "n_layers_by_bits": dict(sorted(by_bits.items())),
        "metric": metrics[names[0]],
        "metrics": metrics,
        "loss": {method: s["budgets"]["loss"][i] for method, s in measures.items()},
    }


def _layer_bits(configuration: np.ndarray, measured: CalibrationTables) -> list[float]:
    n_weights = np.array([layer.n_weights for layer in measured.layers])
    return (measured.nbytes[np.arange(len(n_weights)), configuration] * 8 / n_weights).tolist()


def _label(method: str, task: str) -> str:
    return "head only" if method == "none" and task == "classification" else METHODS[method].label


def _by_stage(seconds: Iterable[tuple[str, float]]) -> dict[str, float]:
    total: defaultdict[str, float] = defaultdict(float)
    for stage, value in seconds:
        total[stage] += value
    return {name: round(value, 2) for name, value in total.items()}


def _notes(task: str, methods: Sequence[str], *, ceiling: str, goal: Goal) -> list[str]:
    notes = [
        "All methods are measured on the same configurations"
        + ("; CoA-LoRA and Shared-LoRA took the same number of steps on the same configurations and examples in the "
           "same order." if "shared" in methods else "."),
        "Configurations were chosen on the search split; validation examples were only measured.",
        f"Full precision: the unquantized base {_CEILINGS[ceiling]}.",
    ]  # fmt: skip
    if goal == "recover":
        notes.append("Training distilled from the base, and the search minimised the KL divergence from it.")
    if task == "classification":
        notes.append(
            "Head only: no LoRA; the classification head alone was trained on the quantized base, with the same steps."
        )
    return notes
