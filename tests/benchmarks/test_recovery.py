"""Arms of the recovery benchmark cost the same, and a run is made once."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import recovery
from benchmarks._settings import SIZES
from benchmarks.recovery import ARMS, SINGLE_RUNS, steps_for


@pytest.mark.parametrize("name", list(SIZES))
def test_arms_cost_the_same_forward_passes(name: str) -> None:
    size = SIZES[name]
    setting = SimpleNamespace(size=size, benchmark=SimpleNamespace(search=range(size.search)))
    for arm in ARMS.values():
        distilled = arm.goal == "recover" or bool(arm.objective.get("distillation"))
        a_step = size.batch_size * (4 if distilled else 3)
        spent = steps_for(arm, setting, size.steps) * a_step  # type: ignore[arg-type]
        spent += 0 if arm.single else size.searches * size.search
        granted = size.steps * size.batch_size * 3 * (1 if arm.single else SINGLE_RUNS)
        assert granted - a_step < spent <= granted


def test_a_run_is_made_once(monkeypatch, tmp_path) -> None:
    made = []
    monkeypatch.setattr(recovery, "CACHE", tmp_path)
    monkeypatch.setattr(recovery, "_run", lambda *given: made.append(given) or {"loss": [1.0]})
    rows, setting = np.zeros((1, 2), dtype=np.int64), SimpleNamespace(identity="one")
    for seed in (0, 0, 1):
        assert recovery._kept(ARMS["ours"], setting, seed, 3, rows, rows) == {"loss": [1.0]}  # type: ignore[arg-type]
    assert len(made) == 2
