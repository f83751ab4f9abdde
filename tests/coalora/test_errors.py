"""The one error: it says all four things, and survives a process boundary."""

from __future__ import annotations

import copy
import pickle

import pytest

from coalora.errors import CoaloraError


def test_the_message_says_rule_got_expected_and_remedy_in_this_order() -> None:
    error = CoaloraError("budgets are positive", got=-1, expected="above 0", remedy="set budget=3")
    assert str(error) == "budgets are positive; got: -1; expected: above 0; remedy: set budget=3"


def test_parts_that_were_not_given_are_left_out_but_falsy_values_are_shown() -> None:
    assert str(CoaloraError("a rule")) == "a rule"
    assert str(CoaloraError("a rule", got=0)) == "a rule; got: 0"
    assert str(CoaloraError("a rule", got=[], expected="")) == "a rule; got: []; expected: "


def test_it_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="a rule"):
        raise CoaloraError("a rule")


@pytest.mark.parametrize("copier", [copy.copy, lambda e: pickle.loads(pickle.dumps(e))], ids=["copy", "pickle"])
def test_a_copy_keeps_its_parts(copier) -> None:  # worker processes send exceptions back pickled
    class_error = CoaloraError("a rule", got=3, expected="4", remedy="add 1")
    copied = copier(class_error)
    assert type(copied) is CoaloraError
    assert (copied.rule, copied.got, copied.expected, copied.remedy) == ("a rule", 3, "4", "add 1")
    assert str(copied) == str(class_error)
