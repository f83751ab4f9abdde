"""The one error: it says what is wrong and what to do, and survives a process boundary."""

from __future__ import annotations

import copy
import pickle

import pytest

from coalora.errors import CoaloraError


def test_the_message_is_the_problem_and_then_the_remedy_as_sentences() -> None:
    error = CoaloraError("budget -1 is negative", remedy="Set budget=3")
    assert str(error) == "budget -1 is negative. Set budget=3."


def test_without_a_remedy_the_message_is_the_problem_alone() -> None:
    assert str(CoaloraError("the set is empty")) == "the set is empty."


def test_a_sentence_that_ends_already_gets_no_second_full_stop() -> None:
    assert str(CoaloraError("Is this a file?", remedy="Look.")) == "Is this a file? Look."


def test_it_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="the set is empty"):
        raise CoaloraError("the set is empty")


@pytest.mark.parametrize("copier", [copy.copy, lambda e: pickle.loads(pickle.dumps(e))], ids=["copy", "pickle"])
def test_a_copy_keeps_its_parts(copier) -> None:  # worker processes send exceptions back pickled
    error = CoaloraError("budget -1 is negative", remedy="Set budget=3")
    copied = copier(error)
    assert type(copied) is CoaloraError
    assert (copied.problem, copied.remedy) == ("budget -1 is negative", "Set budget=3")
    assert str(copied) == str(error)
