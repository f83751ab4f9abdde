"""Settings of the choice space, schemes and rules by layer, and of what a choice costs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.settings.data import Section

Allowed = dict[str, list[int | str]]


class SchemeSettings(Section):
    """A quantization scheme, cut to the values that you allow."""

    scheme: str = Field("nf", description="Quantization scheme: nf, int or float (16 bits).")
    allow: Allowed = Field(
        default_factory=dict,
        description="Allowed values by field, for example bits: [2, 3, 4]; a field left out keeps all its values.",
    )


class RuleSettings(Section):
    """Other choices for some layers: schemes that replace what they had, limits that cut it."""

    layers: str = Field(min_length=1, description="Glob over layer names (*.mlp.*), or a suffix of one (lm_head).")
    scheme: str | None = Field(None, description="Scheme for these layers; none keeps what they have.")
    allow: Allowed = Field(
        default_factory=dict, description="Allowed values by field, of `scheme` or else of what the layers have."
    )
    also: list[SchemeSettings] = Field([], description="Further schemes that these layers may take.")
    min_bits: int | None = Field(None, ge=1, description="Fewest bits of a weight (the field bits, without scales).")
    max_bits: int | None = Field(None, ge=1, description="Most bits of a weight (the field bits, without scales).")

    @model_validator(mode="after")
    def _says_something(self) -> RuleSettings:
        limits = (self.min_bits, self.max_bits)
        if self.scheme is None and self.also:
            raise ValueError("a rule with `also` names its first scheme: set scheme as well")
        if self.scheme is None and not self.allow and limits == (None, None):
            raise ValueError("a rule changes something: set scheme, allow, min_bits or max_bits")
        if None not in limits and limits[0] > limits[1]:  # type: ignore[operator]
            raise ValueError(f"min_bits {self.min_bits} is at most max_bits {self.max_bits}")
        return self


class ChoiceSettings(SchemeSettings):
    """The choice space: what each layer may become. Rules apply in order, each to what those before it left."""

    also: list[SchemeSettings] = Field([], description="Further schemes that every layer may take.")
    rules: list[RuleSettings] = Field([], description="Other choices for some layers.")


class CostSettings(Section):
    """What budgets, the search and the reports count."""

    kind: Literal["average_bits", "bytes", "latency"] = Field(
        "average_bits",
        description="Bits a weight, MB (10^6 bytes) of the packed target layers, or microseconds of a table.",
    )
    table: str | None = Field(None, description="CSV of a device's latencies: layer, choice, microseconds.")

    @model_validator(mode="after")
    def _latency_has_a_table(self) -> CostSettings:
        if (self.kind == "latency") != (self.table is not None):
            raise ValueError("cost.table belongs to cost.kind latency, which needs it: set both or neither")
        return self
