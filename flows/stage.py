"""One part of a pipeline without a server, for `dvc repro`.

    python -m flows.stage calibration|training|evaluation|export|registration NAME [--file ...] [--set ...]

Runs the same stages as the flow under the same cache keys: what either has computed, the other reuses. Results are
copied from the store to `outputs/<part>/`, because DVC deletes its outputs before a stage runs; every part reads the
store, so an earlier part that DVC skipped costs the check of its files and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coalora.calibrate.costs import budget_name
from coalora.files import write_json
from flows.calibration import Calibrated, calibration_chain
from flows.cli import log_to_terminal, parser, run_command
from flows.evaluation import Evaluated, evaluation_chain
from flows.export import Exported, export_chain
from flows.pipeline import check_refresh
from flows.publishing import Rounds, publication_chain, report_chain
from flows.run import PipelineRun
from flows.training import Trained, training_chain
from pipeline.preflight import preflight
from pipeline.settings.definitions import load_settings
from pipeline.stages.runner import DirectRunner
from pipeline.store.store import Artifact

OUTPUTS = Path("outputs")
PARTS = ("calibration", "training", "evaluation", "export", "registration")


@dataclass
class Parts:
    """The chains of a pipeline, each run when it is asked for."""

    run: PipelineRun

    def calibration(self) -> Calibrated:
        return calibration_chain(self.run)

    def training(self, *, track: bool = False) -> tuple[Calibrated, Trained]:
        calibrated = self.calibration()
        return calibrated, training_chain(self.run, calibrated, Rounds(self.run, calibrated.tables) if track else None)

    def evaluation(self) -> tuple[Calibrated, Trained, Evaluated]:
        calibrated, trained = self.training()
        return calibrated, trained, evaluation_chain(self.run, calibrated, trained)

    def export(self) -> tuple[Calibrated, Trained, Exported]:
        calibrated, trained, evaluated = self.evaluation()
        return calibrated, trained, export_chain(self.run, calibrated, trained, evaluated)


def main(arguments: Sequence[str] | None = None) -> int:
    words = "Run one part of a pipeline without a server and write it under outputs/."
    options = parser("flows.stage", words, parts=PARTS).parse_args(arguments)
    settings = load_settings(options.name, file=options.file, changes=options.changes)
    check_refresh(options.refresh)
    preflight(settings, root=Path.cwd())
    log_to_terminal()
    run = PipelineRun.start(options.name, settings, DirectRunner(), refresh=frozenset(options.refresh))
    write_part(options.part, run)
    return 0


def write_part(part: str, run: PipelineRun) -> None:
    """Bring a part up to date and copy it to `outputs/`."""
    parts = Parts(run)
    if part == "calibration":
        _materialize(run, parts.calibration().tables, part)
    elif part == "training":
        _, trained = parts.training(track=True)
        _materialize(run, trained.sets[-1], "training/configurations")
        _materialize(run, trained.states["coa"][-1], "training/coa")
        _materialize(run, trained.states["shared"][-1], "training/shared")
    elif part == "evaluation":
        _, _, evaluated = parts.evaluation()
        _materialize(run, evaluated.selection, "evaluation/selection")
        for method, scores in evaluated.scores.items():
            _materialize(run, scores, f"evaluation/{method}")
        for budget, found in zip(run.settings.evaluation.budgets, evaluated.harness, strict=False):
            _materialize(run, found, f"evaluation/harness/{budget:g}-bits")
    elif part == "export":
        _, _, exported = parts.export()
        _materialize(run, exported.bundle, "export/bundle")
        for budget, export in zip(run.settings.evaluation.budgets, exported.exports, strict=True):
            _materialize(run, export, f"export/{budget_name(budget, run.settings.cost.kind)}")
        _materialize(run, report_chain(run, exported), "report")
    else:
        published = publication_chain(run, *parts.export())
        OUTPUTS.mkdir(exist_ok=True)
        write_json(OUTPUTS / "registration.json", published.model_dump(mode="json", exclude={"report"}))


def _materialize(run: PipelineRun, artifact: Artifact, name: str) -> None:
    run.runner.store.materialize(artifact, OUTPUTS / name)


if __name__ == "__main__":
    run_command(main)
