"""Hyperparameters of the method: each declared once, with its default, range, unit and help.

Recipes are frozen dataclasses. The defaults are those that won in docs/results.md. Metadata of a field (`hyper`) holds
its title, description and limits under the names that pydantic knows, so that the pipeline's settings and the form in
Prefect's UI are made from the same declarations; this module needs neither pydantic nor torch.
"""

# ruff: noqa: RUF009  (`hyper` makes a field)
# No `from __future__ import annotations`: a field's type is read where values are checked.
import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, Self, Union, get_args, get_origin

from coalora.errors import CoaloraError

if TYPE_CHECKING:  # this module is read without torch
    from coalora.models.targets import TargetLayer

Task = Literal["classification", "language-modeling"]
Sampling = Literal["uniform", "low-bits", "low-bits-first", "sandwich", "adaptive"]
Rounding = Literal["absmax", "searched", "feedback"]
Inputs = Literal["original", "quantized"]
Tie = Literal["none", "fused"]
Goal = Literal["recover", "fine-tune"]
Teacher = Literal["auto", "base", "adapted"]
MasterMode = Literal["device", "cpu", "mmap"]
WeightMode = Literal["dequantized", "packed"]
Compile = Literal["auto", "none", "cuda-graph"]
AdapterType = Literal["float32", "float16", "bfloat16", "int8", "int4"]

_LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def _range(limits: Mapping[str, Any], largest: float = math.inf) -> str:
    return ", ".join(
        f"{words} {limits[name]}" for name, words in _LIMITS.items() if limits.get(name, largest) < largest
    )


def described(title: str, help: str, *, unit: str = "", **limits: Any) -> dict[str, Any]:
    """Metadata of a field, by the names of pydantic's `Field`; the range is told in the description too, since forms
    show no other sign of it.

    Args:
        title: a few words, in the field's own terms.
        help: one sentence or two.
        unit: added to the title.
        **limits: ge, gt, le, lt of every number that the field may take.
    """
    words = _range(limits, 1e9)  # a bound that keeps an integer in its bytes says nothing to who fills in a form
    description = f"{help} [{words}]" if words else help
    return {"title": f"{title} ({unit})" if unit else title, "description": description, **limits}


def listed(names: Callable[[], Iterable[str]]) -> Callable[[dict[str, Any]], None]:
    """Change of a name's JSON schema: a form offers the registered names as a list, and ``module:name`` as text."""

    def change(schema: dict[str, Any]) -> None:
        own = {"title": "module:name of your own", "type": schema.pop("type")}
        schema["anyOf"] = [{"title": "Registered", "type": own["type"], "enum": list(names())}, own]

    return change


def with_unit(schema: dict[str, Any]) -> None:
    """Change of a budget's JSON schema: a form takes a number, or a text that names its unit."""
    numbers = schema.pop("anyOf", None) or [{"type": schema.pop("type"), "exclusiveMinimum": 0}]
    schema["anyOf"] = [*numbers, {"title": "With its unit, as 120MB", "type": "string"}]


def hyper(default: Any, title: str, help: str, *, unit: str = "", **limits: Any) -> Any:
    """A field of a recipe: its default, or what makes it, and what `described` says of it."""
    made = {"default_factory" if callable(default) else "default": default}
    return field(**made, metadata=described(title, help, unit=unit, **limits))


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of one part of the method.

    Raises:
        CoaloraError: a value of another type, or outside of its field's range.

    Example:
        >>> from coalora import SearchRecipe
        >>> SearchRecipe.from_dict({"rounds": 3}).to_dict()["candidates"]
        8
    """

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not _fits(value, item.type) or not _inside(value, item.metadata):
                raise CoaloraError(
                    f"{type(self).__name__}.{item.name} is {value!r}", remedy=f"Set it to {_expected(item)}"
                )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, read back by `from_dict`."""
        return {item.name: _plain(getattr(self, item.name)) for item in fields(self)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`; fields left out take their defaults.

        Raises:
            CoaloraError: an unknown key, or a value that does not fit.
        """
        known = {item.name: item.type for item in fields(cls)}
        for key in data:
            if key not in known:
                raise CoaloraError(f"{cls.__name__} has no field {key!r}", remedy=f"Choose among {', '.join(known)}")
        return cls(**{key: _read(value, known[key]) for key, value in data.items()})


@dataclass(frozen=True)
class CalibrationRecipe(Recipe):
    """Measurement of the base model's layers: input statistics, and the error of every choice."""

    n_samples: int = hyper(
        64, "Calibration samples", "Training examples or blocks run through the model.", ge=1, le=1_000_000
    )
    batch_size: int = hyper(16, "Batch size", "Examples a batch.", ge=1, le=65_536)
    hessians: bool = hyper(
        True,
        "Whole Hessians",
        "Collect all of E[x x^T], not its diagonal alone: compensation is weighted by what there is. "
        "Error feedback needs them.",
    )
    rounding: Rounding = hyper(
        "feedback",
        "Rounding",
        "How scales and codes are found: absmax (a group's extremes, to nearest), searched (scales of least error) or "
        "feedback (GPTQ's error feedback under searched scales). absmax alone is quick enough to be done at every "
        "switch; of the others each layer is quantized once under every choice, and kept.",
    )
    inputs: Inputs = hyper(
        "original",
        "Inputs of a block",
        "What blocks are calibrated with: original, what the base model feeds them, or quantized, what reaches them "
        "through the blocks before when their layers take the fewest bytes that they may.",
    )
    hessians_mb: int = hyper(
        1024,
        "Hessians at a time (MB)",
        "Beyond it, blocks are measured and quantized one after the other, with a checkpoint behind each.",
        ge=0,
        le=100_000_000,
    )
    kept_mb: int = hyper(
        4096,
        "Kept quantized weights (MB)",
        "Most that all layers under all choices may take, packed.",
        ge=0,
        le=100_000_000,
    )


@dataclass(frozen=True)
class AdapterRecipe(Recipe):
    """LoRA, the configuration-aware model theta, and what else follows the choices.

    Fields that are None or `auto` are decided by the task (`resolved`).

    Example:
        >>> recipe = AdapterRecipe(r=16).resolved("language-modeling")
        >>> recipe.expert_bits, recipe.expert_start, recipe.scale
        (3, 'compensation', 1.0)
    """

    r: int = hyper(16, "LoRA rank (r)", "Of a layer, compensation included.", ge=1, le=4096)
    lora_alpha: int = hyper(
        16, "LoRA alpha", "LoRA scale s = lora_alpha / r, the same in every layer.", ge=1, le=65_536
    )
    lora_dropout: float = hyper(0.0, "LoRA dropout", "Dropout before lora_A, in training.", ge=0, lt=1)
    theta: Literal["all", "others", "none"] = hyper(
        "others",
        "Choices that theta adjusts",
        "Theta adjusts the shared pair to all, others (those without a pair of their own) or none.",
    )
    embedding_dim: int = hyper(8, "Embedding size of theta", "Size of each embedding of theta.", ge=1, le=4096)
    hidden_dim: int = hyper(128, "Hidden size of theta", "Hidden width of theta.", ge=1, le=65_536)
    compensation_rank: int | None = hyper(
        None,
        "Compensation rank",
        "Part of the rank that is closed-form compensation of each layer's choice; by default none.",
        ge=0,
        le=4096,
    )
    expert_bits: int | None = hyper(
        None,
        "Largest bit-width with a pair of its own",
        "Choices of at most so many bits add a pair of their own to the shared one; 0 for none. "
        "By default 3 for language models, and none for classifiers.",
        ge=0,
        le=8,
    )
    expert_start: Literal["auto", "zero", "compensation"] = hyper(
        "auto",
        "Start of these pairs",
        "zero, or the closed-form compensation of the first choice of their bits; "
        "auto: compensation for language models, which then lose least to quantization, zero for classifiers, which "
        "have more to learn than to make good.",
    )
    leading_ranks: int = hyper(
        0,
        "Ranks of high bits",
        "Cascaded ranks: choices above 3 bits use so many leading ranks of the shared pair, those of 3 bits half of "
        "the others too, those of 2 bits all; 0: all choices use all.",
        ge=0,
        le=4096,
    )
    rank_pattern: Mapping[str, int] = hyper(
        dict,
        "Ranks by layer",
        "Other ranks by layer, each at least 1: a glob of names or kinds, for example mlp.down_proj: 32; "
        "the last match wins.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for pattern, rank in self.rank_pattern.items():
            if not _fits(rank, int) or rank < 1:
                raise CoaloraError(
                    f"rank_pattern gives {pattern!r} the rank {rank!r}", remedy="Set it to an integer of at least 1"
                )

    @property
    def scale(self) -> float:
        """s of y = W x + s B (I + U) A x."""
        return self.lora_alpha / self.r

    def resolved(self, task: Task) -> "AdapterRecipe":
        """The same with what was left open as it won on such tasks (docs/results.md)."""
        language = task == "language-modeling"
        compensation_rank, expert_bits, expert_start = self.compensation_rank or 0, self.expert_bits, self.expert_start
        if expert_bits is None:
            expert_bits = 3 if language else 0
        if expert_start == "auto":
            expert_start = "compensation" if language else "zero"
        return replace(self, compensation_rank=compensation_rank, expert_bits=expert_bits, expert_start=expert_start)

    def ranks(self, layers: "Sequence[TargetLayer]") -> list[int]:
        """Total rank of every layer (N,), compensation included.

        Raises:
            CoaloraError: a pattern that matches no layer, or a rank that leaves nothing to train beside the
                compensation.
        """
        ranks = [self.r] * len(layers)
        for pattern, rank in self.rank_pattern.items():
            matched = [i for i, layer in enumerate(layers) if _matches(layer, pattern)]
            if not matched:
                raise CoaloraError(
                    f"rank_pattern {pattern!r} matches no target layer",
                    remedy=f"Give a glob of names such as {layers[0].name}, or a kind such as {layers[0].kind}",
                )
            for i in matched:
                ranks[i] = rank
        compensated = self.compensation_rank or 0
        for layer, rank in zip(layers, ranks, strict=True):
            if compensated >= rank:
                raise CoaloraError(
                    f"Rank {rank} of {layer.name} leaves nothing to train beside compensation_rank {compensated}",
                    remedy="Raise r (or rank_pattern), or lower compensation_rank",
                )
        return ranks


@dataclass(frozen=True)
class Objective(Recipe):
    """Loss of a training step: (1 - distillation) * task loss + distillation * (outputs * KL + hidden * hidden-state
    error)."""

    distillation: float | None = hyper(
        None,
        "Share of distillation",
        "0 is the task's loss alone, 1 distillation alone; by default 0 to fine-tune and 1 to recover.",
        ge=0,
        le=1,
    )
    temperature: float = hyper(1.0, "Temperature", "Softens the outputs that are compared.", gt=0, le=1000)
    hidden: float = hyper(
        0.0,
        "Weight of hidden states",
        "How much their error counts beside the outputs'; 0 leaves it out.",
        ge=0,
        le=1_000_000,
    )
    states: Literal["all", "last"] = hyper(
        "all", "Hidden states", "Those that are compared: of all blocks, or of the last one."
    )
    outputs: float = hyper(
        1.0, "Weight of outputs", "How much their KL divergence counts; 0 leaves it out.", ge=0, le=1_000_000
    )
    teacher: Teacher = hyper(
        "auto",
        "Teacher",
        "base: without adapter; adapted: with the adapter as it is now, which has learnt the task; auto: adapted to "
        "fine-tune, base to recover.",
    )

    def resolved(self, goal: Goal = "fine-tune") -> "Objective":
        """The same with what was left open as the goal wants it."""
        recover = goal == "recover"
        distillation = float(recover) if self.distillation is None else self.distillation
        teacher = ("base" if recover else "adapted") if self.teacher == "auto" else self.teacher
        return replace(self, distillation=distillation, teacher=teacher)


@dataclass(frozen=True)
class TrainingRecipe(Recipe):
    """Steps and learning rates, which rise over `warmup_steps` and fall to a tenth along a cosine over all rounds."""

    initial_steps: int = hyper(300, "Steps on the initial set", "Before the first search round.", ge=1, le=10_000_000)
    round_steps: int = hyper(
        100, "Steps after each search round", "On the set that the round leaves.", ge=1, le=10_000_000
    )
    batch_size: int = hyper(32, "Batch size", "Examples or blocks a step.", ge=1, le=65_536)
    lr: float = hyper(1e-3, "Learning rate of LoRA", "Peak learning rate of lora_A and lora_B.", gt=0, le=10)
    theta_lr: float | None = hyper(
        None,
        "Learning rate of theta",
        "Peak learning rate of theta; by default 0.0003 for language models and 0.00001 for classifiers.",
        gt=0,
        le=10,
    )
    head_lr: float = hyper(1e-3, "Learning rate of the head", "Peak learning rate of a classifier's head.", gt=0, le=10)
    weight_decay: float = hyper(0.0, "Weight decay", "AdamW's weight decay.", ge=0, le=100)
    warmup_steps: int = hyper(20, "Warm-up", "Steps of linear warm-up; 0 for none.", ge=0, le=10_000_000)
    max_grad_norm: float = hyper(1.0, "Gradient clipping (norm)", "Largest norm of the whole gradient.", gt=0)
    sampling: Sampling = hyper(
        "low-bits",
        "Sampling of configurations",
        "Draw of a step's configuration: uniform, towards low bits, towards low bits first and uniform in the end, by "
        "the sandwich rule, or adaptive, which spends steps where the loss is in excess.",
    )
    sampling_power: float = hyper(
        2.5, "Strength of the sampling", "Of both low-bits (1 is uniform) and of adaptive.", ge=1, le=100
    )
    paired: bool | None = hyper(
        None,
        "Two configurations a step",
        "Half of a step's examples train one configuration, half its counterpart at the other end of the bits; by "
        "default to fine-tune a language model, where batches are of four examples or more and draws not adaptive.",
    )
    lr_by_bits: float = hyper(
        0.0,
        "Learning rate by bits",
        "Power of a configuration's bits, relative to the set's mean, that scales its steps' learning rate.",
        ge=-4,
        le=4,
    )
    objective: Objective = hyper(Objective, "Objective", "Loss that a step minimises.")
    gradient_checkpointing: bool = hyper(
        False,
        "Gradient checkpointing",
        "Compute activations again in the backward pass: less memory, a third more time.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.paired and (self.sampling == "adaptive" or self.batch_size < 2):
            raise CoaloraError(
                f"Two configurations a step were asked for with {self.sampling} draws and batches of {self.batch_size}",
                remedy="Take other draws than adaptive and batches of at least 2, or set paired to false",
            )

    def resolved(self, goal: Goal = "fine-tune", task: Task = "language-modeling") -> "TrainingRecipe":
        """The same with what was left open as the goal and the task want it.

        Example:
            >>> from coalora import TrainingRecipe
            >>> recipe = TrainingRecipe().resolved("recover")
            >>> recipe.objective.teacher, recipe.paired
            ('base', False)
        """
        # docs/results.md, Levers and SST-2.
        language = task == "language-modeling"
        worth = language and goal == "fine-tune" and self.sampling != "adaptive" and self.batch_size >= 4
        paired = worth if self.paired is None else self.paired
        # U grows by the whole hidden layer's activations a step, which unsettles a classifier.
        theta_lr = self.theta_lr or (3e-4 if language else 1e-5)
        return replace(self, paired=paired, theta_lr=theta_lr, objective=self.objective.resolved(goal))

    def total_steps(self, rounds: int) -> int:
        """Length of the learning-rate schedule: it does not start again with every round."""
        return self.initial_steps + rounds * self.round_steps


@dataclass(frozen=True)
class InitialSetRecipe(Recipe):
    """Configuration set of round 0: allocations at evenly spread budgets."""

    size: int = hyper(50, "Budgets of the initial set", "How many, evenly spread.", ge=2, le=10_000)
    min_budget: float | None = hyper(
        None,
        "Smallest budget",
        "In units of cost, or with its unit; by default the least that the choices allow.",
        gt=0,
        json_schema_extra=with_unit,
    )
    max_budget: float | None = hyper(
        None,
        "Largest budget",
        "In units of cost, or with its unit; by default the most that the choices allow.",
        gt=0,
        json_schema_extra=with_unit,
    )


@dataclass(frozen=True)
class SearchRecipe(Recipe):
    """Pareto search over configurations."""

    strategy: str = hyper(
        "ehvi",
        "Search strategy",
        "ehvi proposes by expected hypervolume improvement; random extends the set by as many random "
        "configurations; frozen never changes the initial set; or module:name of your own.",
        json_schema_extra=listed(lambda: _strategies()),
    )
    rounds: int = hyper(2, "Search rounds", "Each is followed by training.", ge=0, le=1000)
    candidates: int = hyper(
        8, "Candidates a round", "Configurations that a round proposes and evaluates.", ge=1, le=10_000
    )
    restarts: int = hyper(8, "Restarts", "Starts of the hill climbing for each proposal.", ge=1, le=10_000)
    max_steps: int = hyper(50, "Moves of a climb", "At most so many.", ge=1, le=100_000)
    delta: int = hyper(
        1, "Step size (delta)", "A neighbour differs in one field by at most so many steps.", ge=1, le=1000
    )
    segments: int = hyper(
        40, "Segments (U)", "Stretches of cost that each keep their non-dominated members.", ge=1, le=10_000
    )
    batch_size: int = hyper(64, "Batch size", "Examples a batch when losses are measured.", ge=1, le=65_536)

    def __post_init__(self) -> None:
        super().__post_init__()
        _strategies().check(self.strategy)


@dataclass(frozen=True)
class RuntimeRecipe(Recipe):
    """Device, number type and memory of the model."""

    device: Literal["auto", "cpu", "cuda"] = hyper("auto", "Device", "auto takes a GPU where there is one.")
    dtype: Literal["auto", "fast", "float32", "bfloat16"] = hyper(
        "auto",
        "Number type",
        "Computing type of the base: auto is bfloat16 on a GPU and float32 on any CPU, so that no result depends on "
        "which CPU it is; fast is bfloat16 on processors that multiply it (AMX, AVX512-BF16) as well.",
    )
    compile: Compile = hyper(
        "auto",
        "Launches of a training step",
        "cuda-graph launches its passes as CUDA graphs; auto does so on a GPU where the model allows it and batches "
        "have one shape, as blocks of text do; none launches kernel by kernel.",
    )
    cache_mib: int | None = hyper(
        None,
        "Cache of layers",
        "Memory for layers of configurations in use: packed and, on a CPU, weights that wait. By default a quarter of "
        "the GPU's memory that is free, or an eighth of the RAM that is available, at most 2048.",
        unit="MiB",
        ge=0,
        le=100_000_000,
    )
    master: MasterMode = hyper(
        "device",
        "Full-precision weights",
        "Place of the full-precision weights: beside the model, in RAM, or in the checkpoint's files.",
    )
    weights: WeightMode = hyper(
        "dequantized",
        "Quantized weights",
        "packed keeps the target layers at their bits and dequantizes on the fly: slower, far less memory.",
    )

    @property
    def cache_bytes(self) -> int | None:
        """`cache_mib` as `QuantizedBase` takes it."""
        return None if self.cache_mib is None else self.cache_mib << 20


@dataclass(frozen=True)
class PretrainRecipe(Recipe):
    """Small Llama decoder trained from scratch on a benchmark's training text: warm-up, then linear decay to zero."""

    hidden_size: int = hyper(128, "Hidden size", "Width of the decoder.", ge=8, le=32_768)
    intermediate_size: int = hyper(384, "MLP size", "Width of its MLP.", ge=8, le=131_072)
    num_hidden_layers: int = hyper(4, "Blocks", "Transformer blocks.", ge=1, le=256)
    num_attention_heads: int = hyper(4, "Attention heads", "Heads of a block.", ge=1, le=256)
    vocab_size: int = hyper(
        512, "Vocabulary", "Tokens of the byte-level BPE tokenizer.", unit="tokens", ge=260, le=1_000_000
    )
    max_length: int = hyper(128, "Block length", "Of its training text.", unit="tokens", ge=8, le=131_072)
    steps: int = hyper(600, "Training steps", "Batches that it sees.", ge=1, le=10_000_000)
    batch_size: int = hyper(16, "Batch size", "Blocks a step.", ge=1, le=65_536)
    lr: float = hyper(3e-3, "Learning rate", "Peak learning rate.", gt=0, le=10)


def check_compile(runtime: RuntimeRecipe, adapter: AdapterRecipe, training: TrainingRecipe) -> None:
    """Refuse CUDA graphs beside what they cannot hold, before anything is loaded.

    Raises:
        CoaloraError: cuda-graph is asked for, with a CPU, packed weights, LoRA dropout or gradient checkpointing.
    """
    obstacle = graph_obstacle(runtime.device, runtime.weights, adapter, training)
    if runtime.compile == "cuda-graph" and obstacle:
        raise CoaloraError(f"runtime.compile is cuda-graph, beside {obstacle}", remedy="Set runtime.compile to auto")


def graph_obstacle(device: str, weights: WeightMode, adapter: AdapterRecipe, training: TrainingRecipe) -> str | None:
    """First thing that a CUDA graph of a training step cannot hold; None where there is none.

    Args:
        device: its type; `auto` is none.
    """
    obstacles = {
        f"a model on {device}": device not in ("auto", "cuda"),
        "LoRA dropout": adapter.lora_dropout > 0,
        "weights that are made in each pass": weights == "packed",
        "gradient checkpointing": training.gradient_checkpointing,
    }
    return next((obstacle for obstacle, there in obstacles.items() if there), None)


def check_goal(goal: Goal, task: Task) -> None:
    """Refuse to recover a classifier: the base has no trained head, and so nothing to be again.

    Raises:
        CoaloraError: it is asked for.
    """
    if goal == "recover" and task != "language-modeling":
        raise CoaloraError(
            f"The goal is to recover, and a base for {task} has no trained head yet", remedy="Set goal to fine-tune"
        )


def _strategies() -> Any:
    from coalora.search.strategies import STRATEGIES  # which knows arrays; this module is read without them

    return STRATEGIES


def _matches(layer: "TargetLayer", pattern: str) -> bool:
    return fnmatch.fnmatchcase(layer.name, pattern) or fnmatch.fnmatchcase(layer.kind, pattern)


def _fits(value: object, hint: Any) -> bool:
    """Whether a value is of a field's type; True and False are no numbers, and infinity is none either."""
    if isinstance(hint, str):
        return True  # a type of another module, which checks its own values
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, int | float) and abs(value) < 1e300  # an integer may be larger than any float
    wanted = get_origin(hint) or hint
    return isinstance(value, wanted) and (wanted is str or not isinstance(value, str))


def _inside(value: object, limits: Mapping[str, float]) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    return limits.get("ge", value) <= value <= limits.get("le", value) and limits.get(
        "gt", -math.inf
    ) < value < limits.get("lt", math.inf)


def _expected(item: "Field[Any]") -> str:
    names = {bool: "True or False", int: "an integer", float: "a number", str: "a string", NoneType: "None"}
    options = get_args(item.type) if get_origin(item.type) in (Union, UnionType) else (item.type,)
    limits = _range(item.metadata)
    words = []
    for option in options:
        if get_origin(option) is Literal:
            words += [repr(value) for value in get_args(option)]
        else:
            name = names.get(option) or f"a {getattr(get_origin(option) or option, '__name__', option)}"
            words.append(f"{name}, {limits}," if limits and option in (int, float) else name)
    return " or ".join(words).removesuffix(",")


def _plain(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def _read(value: Any, hint: Any) -> Any:
    nested = isinstance(hint, type) and issubclass(hint, Recipe) and isinstance(value, Mapping)
    return hint.from_dict(value) if nested else value
