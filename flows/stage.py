"""One part of a pipeline without a server, for `dvc repro`; and `dvc.yaml` itself.

    coalora stage calibration|training|evaluation|export|registration NAME [--file ...] [--set ...]
    coalora dvc [--check]

Runs the same stages as the flow under the same cache keys: what either has computed, the other reuses. Results are
copied from the store to `outputs/<part>/`, because DVC deletes its outputs before a stage runs; every part reads the
store, so an earlier part that DVC skipped costs the check of its files and nothing else. What flow or `dvc repro` have
finished with the same code, settings and inputs is copied before any of this is imported (`flows.parts`).
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from coalora.errors import CoaloraError
from flows.graph import PARTS, Graph, Rounds, start
from flows.parts import REGISTRATION, ROOT, part_key, remember, write_registration
from pipeline.preflight import preflight
from pipeline.settings.sections import Settings
from pipeline.stages.keys import source_closure
from pipeline.stages.runner import DirectRunner
from pipeline.store.store import Artifact

DVC_FILE = "dvc.yaml"
# Part -> what DVC keeps of it, below outputs/.
OUTPUTS = {part: [part] for part in PARTS} | {"export": ["export", "report"], "registration": ["registration.json"]}
# Rooms that a part needs besides those of its stages' code.
_EFFECTS = {"registration": ("pipeline/s3", "pipeline/tracking", "tasks")}
_HEAD = """\
# The pipeline's parts for `dvc repro`; written by `coalora dvc` from flows/graph.py.
# Which pipeline: definitions.repro in pipelines.yaml, or for once
#   dvc exp run -S 'pipelines.yaml:definitions.repro=sst2-minilm'
# Dependencies are whole folders, and all settings: which file and which setting matter to a stage is known to the cache
# that the command looks into.
"""


def run_stage(part: str, name: str, settings: Settings, refresh: Sequence[str] = ()) -> None:
    """Bring a part up to date and copy it to `outputs/`."""
    if part not in PARTS:
        raise CoaloraError(f"A pipeline has no part {part!r}", remedy=f"Choose from {', '.join(PARTS)}")
    key = part_key(part, name, settings)
    run = start(name, settings, DirectRunner(), refresh)
    preflight(settings, root=Path.cwd())
    graph = Graph(run, Rounds(run) if part == "training" else None)
    if part == REGISTRATION:
        write_registration(_registration(graph))
    else:
        for place, artifact in _results(part, graph):
            run.runner.store.materialize(artifact, Path("outputs", place))
    remember_part(part, graph, key)


def remember_part(part: str, graph: Graph, key: str | None) -> None:
    """Keep what a part of this graph has made, for `dvc repro`."""
    remember(part, graph.run.name, key, _registration(graph) if part == REGISTRATION else _results(part, graph))


def _registration(graph: Graph) -> dict[str, Any]:
    return graph.published.model_dump(mode="json", exclude={"report"})


def _results(part: str, graph: Graph) -> Iterator[tuple[str, Artifact]]:
    """(folder below outputs/, artifact) of a part."""
    if part == "calibration":
        yield part, graph.calibrated.tables
    elif part == "training":
        yield f"{part}/configurations", graph.trained.sets[-1]
        for method, states in graph.trained.states.items():
            yield f"{part}/{method}", states[-1]
    elif part == "evaluation":
        evaluated = graph.evaluated
        yield f"{part}/selection", evaluated.selection
        for method, scores in evaluated.scores.items():
            yield f"{part}/{method}", scores
        for budget, found in zip(graph.run.settings.evaluation.budgets, evaluated.harness, strict=False):
            yield f"{part}/harness/{budget:g}-bits", found
    else:
        yield f"{part}/bundle", graph.exported.bundle
        for name, export in graph.named_exports().items():
            yield f"{part}/{name}", export
        yield "report", graph.exported.report


def dvc_yaml() -> str:
    """Content of `dvc.yaml`: each part of the graph with the folders of its code and the outputs that it reads."""
    stages = {
        part: {
            "cmd": f"python -m coalora stage {part} ${{definitions.repro}}",
            "deps": sorted({*_rooms(part), *(f"outputs/{out}" for out in before)}),
            "params": [{"pipelines.yaml": ["definitions.repro", "definitions.pipelines.${definitions.repro}"]}],
            "outs": [f"outputs/{out}" for out in OUTPUTS[part]],
        }
        for part, before in zip(PARTS, [[], *OUTPUTS.values()], strict=False)
    }
    content = {
        "vars": ["pipelines.yaml:definitions"],
        "stages": stages,
        "metrics": ["outputs/report/metrics.json"],
        # Pictures, since the page that DVC draws curves with loads its scripts from the network.
        "plots": ["outputs/report/front.png", "outputs/report/curves.png"],
    }
    return _HEAD + yaml.safe_dump(content, sort_keys=False, width=120)


def _rooms(part: str) -> set[str]:
    """The folders of code that a part's results depend on: packages, and the rooms of `pipeline`."""
    files = {file for stage in PARTS[part] for file in source_closure(stage.fn.__module__).values()}
    rooms = {"flows/graph.py", *_EFFECTS.get(part, ())}
    for file in files:
        package, *inside = file.relative_to(ROOT).parts
        if package != "pipeline":
            rooms.add(package)
        elif len(inside) > 1:
            rooms.add(f"{package}/{inside[0]}")
    return rooms


def write_dvc_yaml(*, check: bool = False) -> None:
    """Write `dvc.yaml`, or with `check` only compare it."""
    file = ROOT / DVC_FILE
    if not check:
        file.write_text(dvc_yaml(), encoding="utf-8")
    elif not file.is_file() or file.read_text(encoding="utf-8") != dvc_yaml():
        raise CoaloraError(f"{DVC_FILE} is not what flows/graph.py says", remedy="Run `coalora dvc`")
