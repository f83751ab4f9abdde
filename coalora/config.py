"""Configuration of the whole method, in the style of PEFT's `LoraConfig`: the adapter's fields at the top, beside them
the choices, and a recipe for each part.
"""

# ruff: noqa: RUF009  (`hyper` makes a field)
# No `from __future__ import annotations`: a field's type is read where values are checked.
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, Self

from coalora.recipes import (
    AdapterRecipe,
    CalibrationRecipe,
    Goal,
    InitialSetRecipe,
    RuntimeRecipe,
    SearchRecipe,
    Tie,
    TrainingRecipe,
    check_compile,
    hyper,
)

if TYPE_CHECKING:
    from coalora.quant.space import ChoiceSpace


def _one_for_each_width() -> "ChoiceSpace":
    from coalora.quant.space import ChoiceSpace

    return ChoiceSpace("nf", scale_bits=[8], scale_dtype=["bf16"], block_size=[64], scale_block_size=[256])


@dataclass(frozen=True, kw_only=True)
class CoaLoraConfig(RuntimeRecipe, AdapterRecipe):
    """Everything that decides a run of CoA-LoRA; what is left out is what won in docs/results.md.

    Raises:
        CoaloraError: a value of another type, or outside of its field's range.

    Example:
        >>> from coalora.quant.space import ChoiceSpace
        >>> config = CoaLoraConfig(r=8, lora_alpha=8, choices=ChoiceSpace("nf", bits=[2, 3, 4]))
        >>> config.training.lr, config.search.rounds
        (0.001, 2)
        >>> CoaLoraConfig.from_dict(config.to_dict()) == config
        True
    """

    goal: Goal = hyper(
        "fine-tune",
        "Goal",
        "recover: be the base model again at any bits, by distilling from it, whatever the text; reported by KL "
        "divergence and agreement. fine-tune: learn a task at any bits; reported by its metric. Decides objective, "
        "teacher, what the search minimises and what is reported, where these are left open.",
    )
    choices: "ChoiceSpace" = hyper(
        _one_for_each_width,
        "Choices",
        "Choices of every target layer; by default NormalFloat of 2, 3, 4 and 8 bits in blocks of 64.",
    )
    tie: Tie = hyper(
        "none",
        "Tied layers",
        "Layers that take one choice: none, or fused: query, key and value of an attention, and gate and up of an MLP, "
        "which engines such as vLLM multiply as one.",
    )
    target_modules: Sequence[str] | Literal["all-linear"] | None = hyper(
        None,
        "Target modules",
        "Layers to quantize: name suffixes or globs, or all-linear; by default those of the architecture.",
    )
    calibration: CalibrationRecipe = hyper(CalibrationRecipe, "Calibration", "Measurement of the base model's layers.")
    training: TrainingRecipe = hyper(TrainingRecipe, "Training", "Steps, learning rates and objective.")
    initial_set: InitialSetRecipe = hyper(InitialSetRecipe, "Initial set", "Configuration set of round 0.")
    search: SearchRecipe = hyper(SearchRecipe, "Search", "Pareto search over configurations.")
    seed: int = hyper(0, "Seed", "Of everything that is drawn.", ge=0, lt=2**31)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_compile(self, self, self.training)

    @property
    def adapter(self) -> AdapterRecipe:
        """The adapter's fields alone."""
        return AdapterRecipe(**{item.name: getattr(self, item.name) for item in fields(AdapterRecipe)})

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`; fields left out take their defaults.

        Raises:
            CoaloraError: an unknown key, or a value that does not fit.
        """
        if isinstance(data.get("choices"), Mapping):
            from coalora.quant.space import ChoiceSpace

            data = {**data, "choices": ChoiceSpace.from_dict(data["choices"])}
        return super().from_dict(data)
