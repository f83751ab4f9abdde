"""The registry, and that a scheme needs no more than its abstract methods."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from coalora.errors import CoaloraError
from coalora.quant import scheme as module
from coalora.quant.scheme import Choice, InputStatistics, Scheme, get_scheme, register_scheme
from coalora.quant.space import ChoiceSpace


@dataclass(frozen=True)
class RoundChoice(Choice):
    step: int


class RoundScheme(Scheme):
    """Rounds to multiples of a step: the least that a scheme can be."""

    name: ClassVar[str] = "round"
    choice_type: ClassVar[type[Choice]] = RoundChoice
    field_values: ClassVar = {"step": (1, 2, 4)}

    def nominal_bits(self, choice: Choice) -> float:
        return 8.0

    def packed_nbytes(self, choice: Choice, shape: Sequence[int]) -> int:
        return shape[0] * shape[1]

    def quantize(self, weight: Tensor, choice: Choice, statistics: InputStatistics | None = None) -> dict[str, Tensor]:
        assert isinstance(choice, RoundChoice)
        return {"codes": (weight / choice.step).round().to(torch.int8)}

    def dequantize(
        self,
        state: Mapping[str, Tensor],
        choice: Choice,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        assert isinstance(choice, RoundChoice)
        return state["codes"].to(dtype) * choice.step

    def pack(self, state: Mapping[str, Tensor], choice: Choice, shape: Sequence[int]) -> dict[str, Tensor]:
        return dict(state)

    def unpack(self, tensors: Mapping[str, Tensor], choice: Choice, shape: Sequence[int]) -> dict[str, Tensor]:
        return dict(tensors)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    get_scheme("nf")
    monkeypatch.setattr(module, "_SCHEMES", dict(module._SCHEMES))


@pytest.mark.usefixtures("registry")
def test_a_registered_scheme_works_through_the_defaults() -> None:
    register_scheme(RoundScheme)
    scheme = get_scheme("round")
    assert scheme.choices() == (RoundChoice(1), RoundChoice(2), RoundChoice(4))
    scheme.require_packages()
    W = torch.tensor([[3.2, -4.9]])
    assert [s["codes"].tolist() for s in scheme.quantize_many(W, scheme.choices())] == [[[3, -5]], [[2, -2]], [[1, -1]]]
    results = list(scheme.fake_quantize_many(torch.tensor([[3.2, -4.9]]), scheme.choices()))
    assert [r.tolist() for r in results] == [[[3, -5]], [[4, -4]], [[4, -4]]]
    assert ChoiceSpace("round", step=[2, 4]).describe(0) == "step=2"


@pytest.mark.usefixtures("registry")
def test_a_name_belongs_to_one_scheme() -> None:
    register_scheme(RoundScheme)
    register_scheme(RoundScheme)  # as a reload does
    other = type("OtherScheme", (RoundScheme,), {})
    with pytest.raises(CoaloraError, match="registered once"):
        register_scheme(other)


def test_an_unknown_scheme_lists_those_that_exist() -> None:
    with pytest.raises(CoaloraError, match=r"got: nope; expected: one of \[.*'int'.*'nf'.*\]"):
        get_scheme("nope")


def test_nf_is_found_by_name_in_a_fresh_process() -> None:
    code = "from coalora.quant.scheme import get_scheme; print(len(get_scheme('nf').choices()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "432"
