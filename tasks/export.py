"""Stage `export`: files for a device, for one budget."""

from pathlib import Path

from pipeline.inputs.exports import ExportInputs
from pipeline.inputs.loaders import load_selected, load_tables
from pipeline.stages.runner import stage
from pipeline.store.store import Artifact, Scalar, current_store


@stage("export")
def export_budget(*, export: ExportInputs, selection: Artifact, index: int) -> Artifact:
    """`configuration.json` and a folder of each format for the budget number `index` of the selection."""
    configuration = load_selected(selection, load_tables(export.tables))[index]

    def write(folder: Path) -> dict[str, Scalar]:
        return export.write(folder, configuration)

    return current_store().put("export", write)
