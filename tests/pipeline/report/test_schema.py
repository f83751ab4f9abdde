from __future__ import annotations

import json
from typing import Any

import pytest

from coalora.errors import CoaloraError
from pipeline.report.schema import Cost, as_result


def test_result_survives_json(result: dict[str, Any]) -> None:
    assert as_result(json.loads(json.dumps(result))) == as_result(result)


@pytest.mark.parametrize("path", [(), ("model",), ("budgets", 0), ("members", 3), ("curves", "coa", 7)])
def test_unknown_keys_are_refused_at_every_depth(result: dict[str, Any], path: tuple[Any, ...]) -> None:
    part: Any = result
    for key in path:
        part = part[key]
    part["colour"] = 1
    with pytest.raises(CoaloraError, match="colour"):
        as_result(result)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "path",
    [("budgets", 1, "metric", "coa"), ("members", 0, "loss", "none"), ("hypervolume", "values", "shared"),
     ("full_precision", "metric"), ("rounds", 0, "hypervolume_after"), ("curves", "coa", 0, "loss")],
)  # fmt: skip
def test_numbers_that_are_not_finite_are_refused(result: dict[str, Any], path: tuple[Any, ...], bad: float) -> None:
    part: Any = result
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = bad
    with pytest.raises(CoaloraError, match=r"finite.*Fix the evaluation") as error:
        as_result(result)
    assert ".".join(map(str, path)) in str(error.value)


def test_parts_that_contradict_each_other_are_refused(result: dict[str, Any]) -> None:
    def broken(change: Any) -> dict[str, Any]:
        copy = json.loads(json.dumps(result))
        change(copy)
        return copy

    for match, change in {
        "one value per arm": lambda r: r["budgets"][0]["metric"].pop("shared"),
        "curves belong to arms": lambda r: r["curves"].update(qlora=[]),
        "total_bytes": lambda r: r["budgets"][0].update(total_bytes=1),
        "one row per budget": lambda r: r["heatmap"]["bits"].pop(),
        "one kind per layer": lambda r: r["heatmap"]["kinds"].pop(),
        "n_layers_by_bits counts all 28": lambda r: r["budgets"][2].update(n_layers_by_bits={"4": 27}),
        "at least 1 item": lambda r: r.update(budgets=[]),
    }.items():
        with pytest.raises(CoaloraError, match=match):
            as_result(broken(change))


def test_arms_come_in_reading_order_whatever_the_input_order(result: dict[str, Any]) -> None:
    result["arms"] = dict(reversed(result["arms"].items()))
    assert as_result(result).arm_names == ["none", "shared", "coa"]


def test_a_budget_counts_as_used_from_nine_tenths_on() -> None:
    cost = Cost.of("average_bits")
    assert cost.unused(3.7, 4.0) is None
    assert cost.unused(2.13, 3.5) == "2.13 bits measured better than anything up to 3.50 bits"
    assert Cost.of("bytes").unused(30.0, 120.0) == "30 MB measured better than anything up to 120 MB"
