"""Stage `result`: everything that a finished run reports, as one checked JSON file."""

from coalora.files import read_json
from coalora.models.files import count_parameters
from pipeline.inputs.adapted import HISTORY
from pipeline.inputs.loaders import ROUND, BaseModel, load_benchmark, load_selected, load_set, load_tables
from pipeline.report.result import RunMeasures, build_result, time_of
from pipeline.report.schema import RESULT
from pipeline.settings.sections import Settings
from pipeline.stages.runner import stage
from pipeline.store.store import Artifact, current_store
from tasks.ceiling import CEILING
from tasks.harness import HARNESS
from tasks.prompts import CONTINUED
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
    continued: Artifact | None = None,
    ceiling: Artifact | None = None,
) -> Artifact:
    """`result.json` of a run."""
    store, measured, source = current_store(), load_tables(tables), BaseModel(base)
    made = [base, benchmark, tables, *searches, selection, *scores.values()]
    made += [a for found in (*references.values(), harness or [], exports) for a in found]
    made += [a for a in (continued, ceiling) if a is not None]
    vocab_size = getattr(source.config(), "vocab_size", 0)
    measures = RunMeasures(
        model={"name": source.name, "digest": source.digest, "vocab_size": vocab_size}
        | {"n_parameters": count_parameters(source.path)},
        data=load_benchmark(benchmark),
        tables=measured,
        members=load_set(selection, measured),
        chosen=load_selected(selection, measured),
        scores={method: read_json(store.path(a) / "scores.json") for method, a in scores.items()},
        n_steps={method: int(trained[-1].meta["step"] or 0) for method, trained in states.items()},
        references={m: [read_json(store.path(a) / REFERENCE_SCORE) for a in of] for m, of in references.items()},
        rounds=[read_json(store.path(a) / ROUND) for a in searches],
        curves={
            method: [step for a in trained for step in read_json(store.path(a) / HISTORY)]
            for method, trained in states.items()
            if trained[-1].meta["step"]
        },
        harness=[read_json(store.path(a) / HARNESS) for a in harness or []],
        continued=read_json(store.path(continued) / CONTINUED) if continued else [],
        ceiling=read_json(store.path(ceiling) / CEILING) if ceiling else None,
        exports=[export.meta for export in exports],
        seconds=[*map(time_of, made), *((f"train {m}", time_of(a)[1]) for m, of in states.items() for a in of)],
    )
    result = build_result(pipeline, settings, measures)
    meta = {f"hypervolume_{method}": value for method, value in result["hypervolume"]["values"].items()}
    return store.put_json("result", {RESULT: result}, meta)
