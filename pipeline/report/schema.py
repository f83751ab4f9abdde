"""Schema of `result.json`: what a finished run reports, checked once, read by every picture and table.

Unknown keys, NaN and infinities are refused, and so are parts that contradict each other (an arm without its
metric, a heat map whose rows do not fit its layers, totals that are not the sum of their parts): a report
that renders is complete. Bits are bits per weight of the N target layers; bytes are bytes on disk.
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from coalora.adapt.methods import METHODS
from coalora.calibrate.costs import UNITS, CostKind
from coalora.errors import CoaloraError
from coalora.evaluate.metrics import AGREEMENT, KL
from coalora.recipes import Goal

Count = Annotated[int, Field(ge=0)]
Bits = Annotated[float, Field(gt=0)]
Seconds = Annotated[float, Field(ge=0)]
Point = tuple[float, float]  # (loss, cost), the order of the search's objectives; the cost is average bits by default

RESULT = "result.json"  # the file of a result artifact


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True, protected_namespaces=())


class Benchmark(_Part):
    name: str
    task: Literal["classification", "language-modeling"]
    metric: str
    higher_is_better: bool
    n_validation: Count
    goal: Goal = "fine-tune"
    reference: str | None = None  # what KL divergence and agreement of a language model are measured against


class Model(_Part):
    name: str
    n_layers: Annotated[int, Field(ge=1)]  # N
    n_weights: Annotated[int, Field(ge=1)]  # P
    n_parameters: Annotated[int, Field(ge=1)]  # of all tensors, the target layers' among them
    digest: str

    @property
    def original_bytes(self) -> int:
        """Size of the whole model with 16 bits a number, as language models are published."""
        return 2 * self.n_parameters


class Cost(_Part):
    """What budgets count, and how it is written."""

    kind: CostKind = "average_bits"
    label: str = "average bits per weight"
    words: str = "average bits"
    unit: str = "bits"

    @classmethod
    def of(cls, kind: CostKind) -> Self:
        unit = UNITS[kind]
        return cls(kind=kind, label=unit.label, words=unit.words, unit=unit.unit)

    def unused(self, at: float, budget: float) -> str | None:
        """What is said of a budget of which less than 9/10 is used; None otherwise."""
        return UNITS[self.kind].unused(at, budget)

    def text(self, value: float) -> str:
        """A cost with its unit."""
        return UNITS[self.kind].text(value)

    def number(self, value: float) -> str:
        return UNITS[self.kind].number(value)


class FullPrecision(_Part):
    metric: float
    metrics: dict[str, float] = {}  # by name, the headline among them
    loss: float
    bits: Bits
    with_adapter: bool = True


class Arm(_Part):
    label: str
    n_steps: Count


class _Measured(_Part):
    average_bits: Bits
    cost: float | None = None  # None: average_bits
    loss: dict[str, float]
    metric: dict[str, float]

    @property
    def at(self) -> float:
        """Where it stands on the axis of cost."""
        return self.average_bits if self.cost is None else self.cost


class Budget(_Measured):
    budget: Bits  # asked for; the rest is of the configuration that was chosen for it
    base_bytes: Count
    adapter_bytes: Count
    total_bytes: Count
    n_layers_by_bits: dict[float, Count]
    metrics: dict[str, dict[str, float]] = {}  # by name and arm, the headline among them
    # Adapters fine-tuned for this configuration alone, by method; they are no arms, as they have no members.
    reference_metric: dict[str, float] = {}
    reference_loss: dict[str, float] = {}

    @model_validator(mode="after")
    def _total_is_the_sum(self) -> Self:
        if self.total_bytes != self.base_bytes + self.adapter_bytes:
            raise ValueError(
                f"total_bytes is base_bytes + adapter_bytes: {self.total_bytes} is not "
                f"{self.base_bytes} + {self.adapter_bytes}"
            )
        return self


class Member(_Measured):
    nbytes: Count  # packed bytes of the target layers
    round: Count


class Hypervolume(_Part):
    ref_point: Point
    ideal: Point
    normalization: str
    values: dict[str, float]


class Round(_Part):
    round: Count
    n_members: Count
    n_candidates: Count
    n_accepted: Count
    hypervolume_before: float
    hypervolume_after: float
    front: list[Point]

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Self:
        """The part of a search round's record that is reported."""
        return cls.model_validate({name: record[name] for name in cls.model_fields})


class Step(_Part):
    step: Count
    loss: float
    lr: float
    round: Count


class Heatmap(_Part):
    """`bits[b][l]`: nominal bits of `layers[l]` under `budgets[b]`; `kinds[l]`: its module kind."""

    layers: Annotated[list[str], Field(min_length=1)]
    kinds: list[str]
    budgets: Annotated[list[Bits], Field(min_length=1)]
    bits: list[list[Bits]]

    @model_validator(mode="after")
    def _shapes_agree(self) -> Self:
        if len(self.kinds) != len(self.layers):
            raise ValueError(f"one kind per layer: {len(self.kinds)} kinds, {len(self.layers)} layers")
        shape = [len(row) for row in self.bits]
        if shape != [len(self.layers)] * len(self.budgets):
            raise ValueError(
                f"bits has one row per budget and one column per layer: "
                f"{len(self.budgets)} x {len(self.layers)} expected, rows of lengths {shape} got"
            )
        return self


class Export(_Part):
    budget: Bits
    folder: str
    digest: str
    adapter_bytes: Count
    base_bytes: Count


class Harness(_Part):
    """CoA-LoRA's numbers on tasks of the lm-evaluation-harness: task -> name, such as `acc,none` -> value."""

    budget: Bits
    tasks: dict[str, dict[str, float]]


class Continued(_Part):
    """What follows a prompt: in full precision, and quantized without and with the adapter."""

    budget: Bits
    prompt: str
    full_precision: str
    none: str
    coa: str


class Result(_Part):
    """A finished run. `arms` are the compared treatments of the same configurations, keyed by short name."""

    pipeline: str
    benchmark: Benchmark
    model: Model
    settings: dict[str, JsonValue]
    cost: Cost = Cost()
    full_precision: FullPrecision
    arms: Annotated[dict[str, Arm], Field(min_length=1)]
    references: dict[str, Arm] = {}
    budgets: Annotated[list[Budget], Field(min_length=1)]
    members: Annotated[list[Member], Field(min_length=1)]
    hypervolume: Hypervolume
    rounds: list[Round]
    curves: dict[str, list[Step]]
    heatmap: Heatmap
    seconds: dict[str, Seconds]
    harness: list[Harness] = []
    continued: list[Continued] = []
    exports: list[Export]
    notes: list[str]

    @model_validator(mode="after")
    def _every_arm_is_measured_everywhere(self) -> Self:
        for where, parts in (("budgets", self.budgets), ("members", self.members)):
            for i, part in enumerate(parts):
                for field in ("metric", "loss"):
                    _same_arms(f"{where}[{i}].{field}", getattr(part, field), self.arms)
        for i, budget in enumerate(self.budgets):
            for field in ("reference_metric", "reference_loss"):
                _same_arms(f"budgets[{i}].{field}", getattr(budget, field), self.references)
            for name, values in budget.metrics.items():
                _same_arms(f"budgets[{i}].metrics[{name!r}]", values, self.arms)
        _same_arms("hypervolume.values", self.hypervolume.values, self.arms)
        unknown = sorted(set(self.curves) - set(self.arms))
        if unknown:
            raise ValueError(f"curves belong to arms: {unknown} not in {sorted(self.arms)}")
        return self

    @model_validator(mode="after")
    def _every_layer_is_counted(self) -> Self:
        n = self.model.n_layers
        if len(self.heatmap.layers) != n:
            raise ValueError(f"heatmap.layers lists the {n} layers of the model, got {len(self.heatmap.layers)}")
        for i, budget in enumerate(self.budgets):
            counted = sum(budget.n_layers_by_bits.values())
            if counted != n:
                raise ValueError(f"budgets[{i}].n_layers_by_bits counts all {n} layers, got {counted}")
        return self

    @property
    def arm_names(self) -> list[str]:
        """Names of the arms in reading order: no adapter, Shared-LoRA, CoA-LoRA, then others as given."""
        known = [name for name in METHODS if name in self.arms]
        return known + [name for name in self.arms if name not in known]

    @property
    def budgets_in_order(self) -> list[Budget]:
        """Budgets from the smallest to the largest."""
        return sorted(self.budgets, key=lambda budget: (budget.budget, budget.average_bits))

    def share(self, n_bytes: int) -> str:
        """A size beside the original's."""
        return f"{n_bytes / self.model.original_bytes:.0%}"

    @property
    def metric_name(self) -> str:
        """The metric in words, for example "bits per byte"."""
        return metric_words(self.benchmark.metric)

    @property
    def beside(self) -> list[str]:
        """Metrics that tables show beside the headline: how near the full-precision reference is, and bits per byte
        where the headline says that itself."""
        known = [name for name in (KL, AGREEMENT, "bits_per_byte") if name in self.budgets[0].metrics]
        return [name for name in known if name != self.benchmark.metric][:2]

    def bits_of_all(self, n_bytes: int) -> float:
        """Bits a weight of everything: a size over all numbers of the model."""
        return 8 * n_bytes / self.model.n_parameters

    @property
    def loss_unit(self) -> str:
        """The loss is mean cross-entropy (of a token for a language model, else of an example) or squared error."""
        return loss_unit(self.benchmark.task, squared=self.benchmark.metric in ("pearson", "spearman"))

    @property
    def searched_unit(self) -> str:
        """The same of the loss that the search minimised: of members, rounds and hypervolumes."""
        return "KL divergence in nats per token" if self.benchmark.goal == "recover" else self.loss_unit

    @property
    def arrow(self) -> str:
        """The direction in which the metric improves."""
        return "↑" if self.benchmark.higher_is_better else "↓"


def metric_words(name: str) -> str:
    """A metric in words, for example "bits per byte"."""
    return {KL: "KL divergence", AGREEMENT: "top-1 agreement"}.get(name, name.replace("_", " "))


def loss_unit(task: str, *, squared: bool) -> str:
    """What a loss counts. `squared`: of numbers and not of classes."""
    if task == "language-modeling":
        return "nats per token"
    return "squared error" if squared else "nats per example"


def _same_arms(where: str, got: Iterable[str], arms: Iterable[str]) -> None:
    if set(got) != set(arms):
        raise ValueError(f"{where} has one value per arm: {sorted(got)} got, {sorted(arms)} expected")


def as_result(result: Mapping[str, Any]) -> Result:
    """Check a run's result.

    Raises:
        CoaloraError: an unknown or missing key, NaN or infinity, or parts that contradict each other; the
            message names the places.
    """
    try:
        return Result.model_validate(result)
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(key) for key in problem['loc']) or 'result'}: {problem['msg']}"
            for problem in error.errors(include_url=False, include_input=False, include_context=False)
        ]
        raise CoaloraError(
            "A result does not fit pipeline/report/schema.py: "
            + "; ".join(problems[:8])
            + (f"; and {len(problems) - 8} more" if len(problems) > 8 else ""),
            remedy="Fix the evaluation that wrote these values; a report never hides a failed measurement",
        ) from error
