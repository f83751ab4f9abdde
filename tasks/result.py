"""Stage `result`: everything that a finished run reports, as one checked JSON file."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from coalora.adapt.methods import METHODS
from coalora.calibrate.costs import budget_name
from coalora.evaluate.compare import compare, guess_loss, normalization
from coalora.evaluate.metrics import reported_metrics
from coalora.files import read_json, write_json
from coalora.models.loading import load_config
from pipeline.inputs.adapted import HISTORY
from pipeline.inputs.loaders import BaseModel, load_benchmark, load_selected, load_set, load_tables
from pipeline.report.schema import RESULT, as_result
from pipeline.settings.sections import Settings
from pipeline.stages.runner import stage
from pipeline.store.store import Artifact, Scalar, Store
from tasks.harness import HARNESS
from tasks.reference import REFERENCE_SCORE


@stage("result")
def assemble(
    *,
    pipeline: str,
    settings: Settings,
    base: Artifact,
    benchmark: Artifact,
    tables: Artifact,
    searches: list[Artifact],
    selection: Artifact,
    states: dict[str, list[Artifact]],
    scores: dict[str, Artifact],
    exports: list[Artifact],
    references: dict[str, list[Artifact]],
    harness: list[Artifact] | None = None,
) -> Artifact:
    """`result.json` of a run.

    Args:
        searches: the sets that the search rounds made, in order.
        states: method -> its training states, round by round.
        scores: method -> its evaluation.
        exports: one for each asked budget.
        references: method -> its score for each asked budget.
        harness: one for each asked budget, where harness tasks are asked for.
    """
    store = Store()
    data, measured, source = load_benchmark(benchmark), load_tables(tables), BaseModel(base)
    members, chosen = load_set(selection, measured), load_selected(selection, measured)
    measures = {method: read_json(store.path(s) / "scores.json") for method, s in scores.items()}
    bits = measured.average_bits(members.configurations)
    nbytes, costs = measured.total_nbytes(members.configurations), measured.costs(members.configurations)
    alone = {m: [read_json(store.path(a) / REFERENCE_SCORE) for a in made] for m, made in references.items()}
    comparison = compare(
        {method: np.array(s["members"]["loss"]) for method, s in measures.items()},
        costs,
        cost_range=measured.cost_range(),
        guess_loss=guess_loss(data.validation, data.num_labels or load_config(source.path).vocab_size),
    )
    asked = settings.benchmark
    reported = reported_metrics(data.task, data.num_labels, asked.metric, asked.metrics)
    headline = reported[0]
    ceiling = measures["shared"]["full_precision"]
    rounds = [read_json(store.path(s) / "round.json") for s in searches]
    keep = (
        "round",
        "n_members",
        "n_candidates",
        "n_accepted",
        "hypervolume_before",
        "hypervolume_after",
        "front",
    )
    content: dict[str, Any] = {
        "pipeline": pipeline,
        "benchmark": {
            "name": data.name,
            "task": data.task,
            "metric": headline.name,
            "higher_is_better": headline.higher_is_better,
            "n_validation": len(data.validation),
        },
        "model": {
            "name": source.name,
            "n_layers": len(measured.layers),
            "n_weights": measured.n_weights,
            "digest": source.digest,
        },
        "settings": settings.model_dump(mode="json"),
        "cost": {
            "kind": measured.cost_kind,
            "label": measured.cost_unit.label,
            "words": measured.cost_unit.words,
            "unit": measured.cost_unit.unit,
        },
        "full_precision": {
            "loss": ceiling["loss"],
            "metric": ceiling["metrics"][headline.name],
            "metrics": {m.name: ceiling["metrics"][m.name] for m in reported},
            "bits": 8.0 * _bytes_per_weight(settings),
        },
        "arms": {
            method: {"label": _label(method, data.task), "n_steps": int(states[method][-1].meta["step"] or 0)}
            for method in measures
        },
        "references": {
            method: {"label": _label(method, data.task), "n_steps": alone[method][0]["steps"]} for method in alone
        },
        "budgets": [
            _budget(budget, configuration, export, i, measured, measures, [m.name for m in reported])
            | {f"reference_{part}": {m: rows[i][part] for m, rows in alone.items()} for part in ("metric", "loss")}
            for i, (budget, configuration, export) in enumerate(
                zip(settings.evaluation.budgets, chosen, exports, strict=True)
            )
        ],
        "members": [
            {
                "average_bits": float(bits[i]),
                "cost": float(costs[i]),
                "nbytes": int(nbytes[i]),
                "round": int(members.joined[i]),
                "loss": {method: s["members"]["loss"][i] for method, s in measures.items()},
                "metric": {method: s["members"]["metrics"][headline.name][i] for method, s in measures.items()},
            }
            for i in range(len(members))
        ],
        "hypervolume": {
            "ref_point": comparison.ref_point,
            "ideal": comparison.ideal,
            "normalization": normalization(measured.cost_unit.words),
            "values": comparison.values,
        },
        "rounds": [{key: record[key] for key in keep} for record in rounds],
        "curves": {
            method: [
                {key: step[key] for key in ("step", "loss", "lr", "round")}
                for state in trained
                for step in read_json(store.path(state) / HISTORY)
            ]
            for method, trained in states.items()
            if trained[-1].meta["step"]
        },
        "heatmap": {
            "layers": [layer.name for layer in measured.layers],
            "kinds": [layer.kind for layer in measured.layers],
            "budgets": settings.evaluation.budgets,
            "bits": [_layer_bits(configuration, measured) for configuration in chosen],
        },
        "harness": [
            {"budget": budget, "tasks": read_json(store.path(found) / HARNESS)}
            for budget, found in zip(settings.evaluation.budgets, harness or [], strict=False)
        ],
        "seconds": _seconds(
            base,
            benchmark,
            tables,
            *searches,
            selection,
            *scores.values(),
            *(artifact for made in references.values() for artifact in made),
            *(harness or []),
            *exports,
            states=states,
        ),
        "exports": [
            {
                "budget": budget,
                "folder": f"export/{budget_name(budget, measured.cost_kind)}",
                "digest": export.meta["digest"],
                "adapter_bytes": export.meta["adapter_bytes"],
                "base_bytes": export.meta["base_bytes"],
            }
            for budget, export in zip(settings.evaluation.budgets, exports, strict=True)
        ],
        "notes": _notes(data.task),
    }
    result = as_result(content).model_dump(mode="json")

    def write(folder: Path) -> dict[str, Scalar]:
        write_json(folder / RESULT, result)
        return {f"hypervolume_{method}": value for method, value in comparison.values.items()}

    return store.put("result", write)


def _budget(
    budget: float,
    configuration: np.ndarray,
    export: Artifact,
    i: int,
    measured: Any,
    measures: dict[str, Any],
    names: list[str],
) -> dict[str, Any]:
    metrics = {name: {method: s["budgets"]["metrics"][name][i] for method, s in measures.items()} for name in names}
    base_bytes, adapter_bytes = int(export.meta["base_bytes"] or 0), int(export.meta["adapter_bytes"] or 0)
    by_bits = Counter(measured.space.choice_dict(int(k))["bits"] for k in configuration)
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


def _layer_bits(configuration: np.ndarray, measured: Any) -> list[float]:
    n_weights = np.array([layer.n_weights for layer in measured.layers])
    return (measured.nbytes[np.arange(len(n_weights)), configuration] * 8 / n_weights).tolist()


def _label(method: str, task: str) -> str:
    return "head only" if method == "none" and task == "classification" else METHODS[method].label


def _bytes_per_weight(settings: Settings) -> int:
    return {"float32": 4, "bfloat16": 2}.get(settings.runtime.dtype, 4)


def _seconds(*artifacts: Artifact, states: dict[str, list[Artifact]]) -> dict[str, float]:
    """Wall time of the stages that made these artifacts, summed by kind."""
    total: defaultdict[str, float] = defaultdict(float)
    for artifact in artifacts:
        seconds = [float(artifact.meta.get(name) or 0) for name in ("seconds", "shard_seconds")]
        total[str(artifact.meta.get("stage", artifact.kind))] += sum(seconds)
    for method, trained in states.items():
        for artifact in trained:
            total[f"train {method}"] += float(artifact.meta.get("seconds") or 0)
    return {name: round(value, 2) for name, value in total.items()}


def _notes(task: str) -> list[str]:
    notes = [
        "All methods are measured on the same configurations; CoA-LoRA and Shared-LoRA took the same number of steps "
        "on the same configurations and examples in the same order.",
        "Configurations were chosen on the search split; validation examples were only measured.",
        "Full precision: the unquantized base with the Shared-LoRA adapter.",
    ]
    if task == "classification":
        notes.append(
            "Head only: no LoRA; the classification head alone was trained on the quantized base, with the same steps."
        )
    return notes
