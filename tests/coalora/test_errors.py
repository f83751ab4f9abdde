"""The one error: it says what is wrong and what to do, and survives a process boundary."""

from __future__ import annotations

import copy
import pickle

import pytest

from coalora.errors import CoaloraError, printable


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


def test_control_characters_of_what_is_named_are_escaped_and_line_breaks_stay() -> None:
    error = CoaloraError("no run 'a\x1b[2J\x9b\r\u202eb\udc80'\nin here", remedy="Run \x07rm")
    assert str(error) == "no run 'a\\x1b[2J\\x9b\\r\\u202eb\\udc80'\nin here. Run \\x07rm."
    assert "é中 it's" in str(CoaloraError("é中 it's"))


def test_a_message_quotes_at_most_200_characters_of_a_value() -> None:
    value = "x" * 1_000_000
    for quoted in (repr(value), f'"{value}"'):
        text = str(CoaloraError(f"MLflow's name is {quoted}, which isn't a model's", remedy=f"Leave {quoted} out"))
        assert len(text) < 600
        assert text.endswith("out.")
        assert "which isn't a model's" in text
    assert len(str(CoaloraError(f"the list {[1] * 1_000_000} is long"))) < 2100


def test_colours_are_let_through_where_they_are_asked_for_and_nothing_else() -> None:
    assert printable("\x1b[1;31mred\x1b[0m\x1b[2J", colours=True) == "\x1b[1;31mred\x1b[0m\\x1b[2J"
    assert printable("\x1b[1mred") == "\\x1b[1mred"
