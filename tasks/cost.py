"""Stage `cost`: calibration tables that count something else than average bits."""

import os
import shutil
from pathlib import Path

from coalora.recipes import AdapterRecipe
from pipeline.inputs.choices import priced_tables
from pipeline.inputs.loaders import TABLES, load_tables
from pipeline.settings.sections import CostSettings
from pipeline.stages.runner import stage
from pipeline.store.store import MANIFEST, Artifact, Scalar, current_store


@stage("cost")
def apply_cost(
    *, tables: Artifact, cost: CostSettings, adapter: AdapterRecipe | None, adapter_dtype: str, content: str | None
) -> Artifact:
    """The same calibration with the cost that is asked for: a changed cost does not calibrate again.

    Args:
        adapter, adapter_dtype: what is stored beside the base; None, and any, for costs that do not count it.
        content: digest of the latency table; None for other costs.
    """
    priced = priced_tables(load_tables(tables), cost, adapter, adapter_dtype)

    def write(folder: Path) -> dict[str, Scalar]:
        priced.save(folder / TABLES)
        for source in current_store().path(tables).iterdir():
            if source.name in (TABLES, MANIFEST):
                continue
            try:  # read-only on both sides, and Hessians are large
                os.link(source, folder / source.name)
            except OSError:
                shutil.copyfile(source, folder / source.name)
        low, high = priced.cost_range()
        return {**tables.meta, "cost": cost.kind, "min_cost": low, "max_cost": high}

    return current_store().put("calibration", write)
