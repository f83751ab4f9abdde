"""Stage `cost`: calibration tables that count something else than average bits."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coalora.calibrate.costs import read_latency
from coalora.calibrate.tables import CalibrationTables
from tasks.engine import stage
from tasks.loaders import STATISTICS, TABLES, load_tables
from tasks.settings import CostSettings
from tasks.store import Artifact, Scalar, Store


@stage("cost")
def apply_cost(*, tables: Artifact, cost: CostSettings, content: str | None) -> Artifact:
    """The same calibration with the cost that is asked for: a changed cost does not calibrate again.

    Args:
        content: digest of the latency table; None for other costs.
    """
    priced = priced_tables(load_tables(tables), cost)

    def write(folder: Path) -> dict[str, Scalar]:
        priced.save(folder / TABLES)
        source = Store().path(tables) / STATISTICS
        try:  # read-only on both sides, and Hessians are large
            os.link(source, folder / STATISTICS)
        except OSError:
            shutil.copyfile(source, folder / STATISTICS)
        low, high = priced.cost_range()
        return {**tables.meta, "cost": cost.kind, "min_cost": low, "max_cost": high}

    return Store().put("calibration", write)


def priced_tables(tables: CalibrationTables, cost: CostSettings) -> CalibrationTables:
    """The tables with the cost that settings ask for.

    Raises:
        CoaloraError: a latency table that does not fit.
    """
    latency: NDArray[np.float64] | None = None
    if cost.table is not None:
        latency = read_latency(Path(cost.table), tables.layers, tables.space, tables.allowed)
    return replace(tables, cost_kind=cost.kind, latency=latency)
