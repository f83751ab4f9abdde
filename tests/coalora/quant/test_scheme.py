"""A scheme of another package needs no more than its abstract methods."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from coalora.quant.registry import get_scheme
from coalora.quant.scheme import Choice, InputStatistics, Scheme
from coalora.quant.space import ChoiceSpace


@dataclass(frozen=True)
class RoundChoice(Choice):
    field_values: ClassVar = {"step": (1, 2, 4)}
    step: int


class RoundScheme(Scheme):
    """Rounds to multiples of a step: the least that a scheme can be."""

    name = "round"
    choice_type: ClassVar[type[Choice]] = RoundChoice

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


def test_a_scheme_of_another_module_works_through_the_defaults() -> None:
    scheme = get_scheme(f"{__name__}:RoundScheme")
    assert scheme.choices() == (RoundChoice(1), RoundChoice(2), RoundChoice(4))
    scheme.require_packages()
    W = torch.tensor([[3.2, -4.9]])
    found = scheme.quantize_layers([W], scheme.choices(), [None])
    assert [s["codes"].tolist() for (s,) in found] == [[[3, -5]], [[2, -2]], [[1, -1]]]
    results = [scheme.fake_quantize(torch.tensor([[3.2, -4.9]]), choice) for choice in scheme.choices()]
    assert [r.tolist() for r in results] == [[[3, -5]], [[4, -4]], [[4, -4]]]


def test_a_choice_space_of_it_is_written_and_read() -> None:
    space = ChoiceSpace(f"{__name__}:RoundScheme", step=[2, 4])
    assert space.describe(0) == "step=2"
    written = space.to_dict()
    assert written["source"] == hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    assert ChoiceSpace.from_dict(json.loads(json.dumps(written))) == space
    assert ChoiceSpace("nf").to_dict().keys() == {"scheme", "fields"}


def test_nf_is_found_by_name_in_a_fresh_process() -> None:
    code = "from coalora.quant.registry import get_scheme; print(len(get_scheme('nf').choices()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "432"
