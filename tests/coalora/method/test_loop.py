"""A fit that breaks off goes on from its checkpoints to the numbers of an undisturbed one, and from no other's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from coalora.method.initial import initial_set
from coalora.method.loop import Fitted, fit
from coalora.recipes import InitialSetRecipe, SearchRecipe, TrainingRecipe

TRAINING = TrainingRecipe(initial_steps=4, round_steps=3, batch_size=2, warmup_steps=1)


@pytest.fixture
def fitting(tiny_llama, make_adapted, tables_for, text_split) -> Callable[..., Fitted]:
    def run(folder: Path | None, training: TrainingRecipe = TRAINING, **options: object) -> Fitted:
        adapted, tables = make_adapted(tiny_llama()), tables_for(tiny_llama())
        search = SearchRecipe(rounds=1, candidates=2, restarts=2, batch_size=8)
        members = initial_set(tables, InitialSetRecipe(size=3))
        return fit(
            adapted, text_split, text_split, members, tables,
            training=training, search=search, seed=0, checkpoint_dir=folder, **options,
        )  # fmt: skip

    return run


def _stops(at: str) -> Callable[[str], Callable[..., None]]:
    def listener(what: str) -> Callable[..., None]:
        def told(*done: int, **values: float) -> None:
            if what == at:
                raise KeyboardInterrupt

        return told

    return listener


def test_a_fit_that_breaks_off_goes_on_to_the_same_numbers_without_training_again(
    fitting, tmp_path, monkeypatch
) -> None:
    undisturbed = fitting(None)
    for at in ("search, round 1, set measured", "training, round 1"):
        with pytest.raises(KeyboardInterrupt):
            fitting(tmp_path, progress=_stops(at))
    steps = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *given: steps.append(1) or step(self, *given))
    resumed = fitting(tmp_path)
    assert len(steps) == 0  # both rounds were at their last step
    assert resumed.history == undisturbed.history
    assert resumed.searches == undisturbed.searches
    assert resumed.state.tensors.keys() == undisturbed.state.tensors.keys()
    assert all(torch.equal(t, undisturbed.state.tensors[name]) for name, t in resumed.state.tensors.items())


def test_checkpoints_of_another_fit_are_left_alone(fitting, tmp_path) -> None:
    other = TrainingRecipe(initial_steps=4, round_steps=3, batch_size=2, warmup_steps=1, lr=2e-3)
    fitting(tmp_path)
    assert fitting(tmp_path, other).history == fitting(None, other).history
    assert len(list(tmp_path.iterdir())) == 4
