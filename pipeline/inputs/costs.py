"""Calibration tables with the cost that settings ask for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coalora.calibrate.costs import read_latency
from coalora.calibrate.tables import CalibrationTables
from pipeline.settings.sections import CostSettings


def priced_tables(tables: CalibrationTables, cost: CostSettings) -> CalibrationTables:
    """The tables with the cost that settings ask for.

    Raises:
        CoaloraError: a latency table that does not fit.
    """
    latency: NDArray[np.float64] | None = None
    if cost.table is not None:
        latency = read_latency(Path(cost.table), tables.layers, tables.space, tables.allowed)
    return replace(tables, cost_kind=cost.kind, latency=latency)
