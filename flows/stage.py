"""One part of a pipeline without a server, for `dvc repro`; and `dvc.yaml` itself.

    coalora stage inputs|calibration|training|evaluation|export|registration NAME [--file ...] [--set ...]
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
from flows.parts import INPUTS, REGISTRATION, ROOT, part_key, remember, write_registration
from pipeline.preflight import preflight
from pipeline.settings.sections import Settings
from pipeline.stages.runner import DirectRunner
from pipeline.store.store import Artifact

DVC_FILE = "dvc.yaml"
# Part -> what DVC keeps of it, below outputs/.
OUTPUTS = {part: [part] for part in PARTS} | {"export": ["export", "report"], "registration": ["registration.json"]}
_HEAD = """\
# The pipeline's parts for `dvc repro`; written by `coalora dvc` from flows/graph.py.
# Which pipeline: definitions.repro in pipelines.yaml, or for once
#   dvc exp run -S 'pipelines.yaml:definitions.repro=sst2-minilm'
# Stage `inputs` runs every time, in two seconds: it writes digests of code, settings and input files, which every part
# depends on, in place of a column of `dvc exp show` for each of them. All settings that differ:
#   dvc params diff --targets pipelines.yaml -- HEAD
"""


def run_stage(part: str, name: str, settings: Settings, refresh: Sequence[str] = ()) -> None:
    """Bring a part up to date and copy it to `outputs/`."""
    if part not in PARTS:
        raise CoaloraError(f"A pipeline has no part {part!r}", remedy=f"Choose from {', '.join((INPUTS, *PARTS))}")
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
    """Content of `dvc.yaml`: what decides a result, then each part of the graph behind the outputs that it reads."""
    command = "python -m coalora stage {} ${{definitions.repro}}"
    stages: dict[str, Any] = {
        INPUTS: {"cmd": command.format(INPUTS), "always_changed": True, "outs": [f"outputs/{INPUTS}"]}
    }
    for part, before in zip(PARTS, [None, *PARTS], strict=False):
        read = [OUTPUTS[before][-1]] if before else []
        stages[part] = {
            "cmd": command.format(part),
            "deps": [f"outputs/{out}" for out in (INPUTS, *read)],
            "outs": [f"outputs/{out}" for out in OUTPUTS[part]],
        }
    content = {
        "vars": ["pipelines.yaml:definitions"],
        "stages": stages,
        "params": [f"outputs/{INPUTS}/settings.json"],
        "metrics": ["outputs/report/metrics.json"],
        # Pictures, since the page that DVC draws curves with loads its scripts from the network.
        "plots": ["outputs/report/front.png", "outputs/report/curves.png"],
    }
    return _HEAD + yaml.safe_dump(content, sort_keys=False, width=120)


def write_dvc_yaml(*, check: bool = False) -> None:
    """Write `dvc.yaml`, or with `check` only compare it."""
    file = ROOT / DVC_FILE
    if not check:
        file.write_text(dvc_yaml(), encoding="utf-8")
    elif not file.is_file() or file.read_text(encoding="utf-8") != dvc_yaml():
        raise CoaloraError(f"{DVC_FILE} is not what flows/graph.py says", remedy="Run `coalora dvc`")
