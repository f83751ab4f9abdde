"""The table of a round's set."""

from __future__ import annotations

from pipeline.inputs.loaders import load_set, load_tables
from pipeline.report.rounds import round_rows
from tests.tiny_run import at_home, tiny_run


def test_the_table_of_a_set_counts_the_layers_at_their_stored_bits() -> None:
    run = tiny_run()
    with at_home(run.home):
        measured = load_tables(run.calibrated.tables)
        rows = round_rows(load_set(run.trained.sets[1], measured), measured)
    assert [row["average bits"] for row in rows] == sorted(row["average bits"] for row in rows)
    for row in rows:
        counts = [part.split(" at ") for part in row["layers by bits"].split(", ")]
        assert sum(int(n) for n, _ in counts) == len(measured.layers)
        assert min(float(b) for _, b in counts) <= row["average bits"] + 0.05
        assert max(float(b) for _, b in counts) >= row["average bits"] - 0.05
