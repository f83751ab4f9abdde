"""Settings of a pipeline: typed, with units and ranges, one for the command line, DVC and the form in Prefect's UI.

Unknown keys are errors. Every section is the input of the stages that use it and of no other, so that changing it runs
those stages again and nothing before them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from coalora.adapt.methods import METHODS
from pipeline.settings.choices import ChoiceSettings, CostSettings
from pipeline.settings.data import BenchmarkSettings, ModelSettings, Section
from pipeline.settings.storage import StorageSettings

if TYPE_CHECKING:
    from coalora.recipes import AdapterRecipe, Task


class CalibrationSettings(Section):
    """How the base model's layers are measured."""

    n_samples: int = Field(64, ge=1, description="Training examples or blocks run through the model.")
    batch_size: int = Field(16, ge=1, description="Examples a batch.")
    hessians: bool = Field(
        True,
        description="Collect all of E[x x^T], not its diagonal alone: compensation is weighted by what there is.",
    )


class AdapterSettings(Section):
    """LoRA, the configuration-aware model theta, and what else follows the choices."""

    r: int = Field(16, ge=1, description="LoRA rank of a layer, compensation included.")
    lora_alpha: int = Field(16, ge=1, description="LoRA scale s = lora_alpha / r.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before lora_A.")
    theta: Literal["all", "others", "none"] = Field(
        "others", description="Choices that theta adjusts the pair to: all, those without a pair of their own, or none."
    )
    embedding_dim: int = Field(8, ge=1, description="Size of each embedding of theta.")
    hidden_dim: int = Field(128, ge=1, description="Hidden width of theta.")
    compensation_rank: int | None = Field(
        None,
        ge=0,
        description="Part of the rank that is closed-form compensation of each layer's choice; 0 for none. "
        "By default half of the rank for classifiers, and none for language models.",
    )
    expert_bits: int | None = Field(
        None,
        ge=0,
        le=8,
        description="Choices of at most so many bits add a pair of their own to the shared one; 0 for none. "
        "By default 3 for language models, and none for classifiers.",
    )
    expert_start: Literal["auto", "zero", "compensation"] = Field(
        "auto",
        description="Where these pairs start: zero, or the closed-form compensation of their bits; "
        "auto: compensation for language models, zero for classifiers.",
    )
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(
        default_factory=dict,
        description="Other ranks by layer: a glob of names or kinds, for example mlp.down_proj: 32.",
    )

    def recipe(self, task: Task) -> AdapterRecipe:
        """The adapter of a task: what was left open is what won on such tasks (docs/results.md)."""
        from coalora.recipes import AdapterRecipe

        return AdapterRecipe(**self.model_dump()).resolved(task)


class ObjectiveSettings(Section):
    """Task loss, distillation from the full-precision model, or both."""

    distillation: float = Field(0.0, ge=0, le=1, description="0 is the task's loss alone, 1 distillation alone.")
    temperature: float = Field(1.0, gt=0, description="Softens the outputs that are compared.")
    hidden: float = Field(0.0, ge=0, description="Weight of the hidden states' error beside the outputs'.")
    teacher: Literal["auto", "base", "adapted"] = Field(
        "auto",
        description="base: without adapter; adapted: with the adapter as it is now; auto: base for language models.",
    )


class TrainingSettings(Section):
    """Steps and learning rates; the same for every method that is compared."""

    initial_steps: int = Field(300, ge=1, description="Steps on the initial configuration set.")
    round_steps: int = Field(100, ge=1, description="Steps after every search round.")
    batch_size: int = Field(32, ge=1, description="Examples or blocks a step.")
    lr: float = Field(1e-3, gt=0, description="Peak learning rate of lora_A and lora_B.")
    theta_lr: float = Field(1e-3, gt=0, description="Peak learning rate of theta.")
    head_lr: float = Field(1e-3, gt=0, description="Peak learning rate of a classifier's head.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    warmup_steps: int = Field(20, ge=1, description="Steps of linear warm-up.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradient clipping.")
    sampling: Literal["uniform", "low-bits", "sandwich", "adaptive"] = Field(
        "low-bits",
        description="How a step draws its configuration; adaptive spends steps where the loss is in excess.",
    )
    sampling_power: float = Field(2.5, ge=1, description="Strength of low-bits (1 is uniform) and of adaptive.")
    objective: ObjectiveSettings = Field(ObjectiveSettings(), description="What a step minimises.")
    gradient_checkpointing: bool = Field(
        False, description="Compute activations again in the backward pass: less memory, a third more time."
    )


class BaselineSettings(Section):
    """What CoA-LoRA is compared with, on the same configurations, examples and steps."""

    methods: list[str] = Field(
        ["none", "shared"],
        description="Trained over the same sets: none (no adapter), shared (Shared-LoRA), paper (theta as there).",
    )
    per_budget: list[str] = Field(
        default_factory=list,
        description="Trained for each budget's configuration alone: qlora, lq-lora (started from the error's SVD).",
    )
    per_budget_steps: int | None = Field(
        None, ge=1, description="Steps of each such run; by default those of the whole training."
    )

    @field_validator("methods", "per_budget")
    @classmethod
    def _trained_as_they_are(cls, methods: list[str], field: ValidationInfo) -> list[str]:
        place = {"sets": "methods", "budget": "per_budget"}
        if "coa" in methods:
            raise ValueError("leave coa out: it is what the others are compared with")
        for method in methods:
            if place[METHODS[method].over] != field.field_name:
                raise ValueError(f"move {method} to {place[METHODS[method].over]}")
        return methods

    @field_validator("methods")
    @classmethod
    def _shared_gives_the_ceiling(cls, methods: list[str]) -> list[str]:
        if len(set(methods)) < len(methods) or "shared" not in methods:
            raise ValueError(
                "give each method once, and shared among them: full precision is measured with its adapter"
            )
        return methods


class InitialSetSettings(Section):
    """The configuration set of round 0: allocations at evenly spread budgets."""

    size: int = Field(50, ge=2, description="Number of budgets.")
    min_budget: float | None = Field(None, gt=0, description="Smallest budget, in units of cost; else the space's.")
    max_budget: float | None = Field(None, gt=0, description="Largest budget, in units of cost; else the space's.")
    file: str | None = Field(
        None, min_length=1, description="Start with this set, as flows.restore writes it, instead of allocations."
    )


class SearchSettings(Section):
    """The Pareto search over configurations."""

    strategy: Literal["ehvi", "random", "frozen"] = Field(
        "ehvi",
        description="ehvi proposes by expected hypervolume improvement; random extends the set by as many random "
        "configurations; frozen never changes the initial set.",
    )
    rounds: int = Field(2, ge=0, description="Search rounds, each followed by training.")
    candidates: int = Field(8, ge=1, description="Configurations proposed and evaluated a round.")
    restarts: int = Field(8, ge=1, description="Starts of the hill climbing for each proposal.")
    max_steps: int = Field(50, ge=1, description="Moves of one climb at most.")
    delta: int = Field(1, ge=1, description="A neighbour differs in one field by at most so many steps.")
    segments: int = Field(40, ge=1, description="U: segments of cost that each keep their non-dominated members.")
    batch_size: int = Field(64, ge=1, description="Examples a batch when losses are measured.")


class EvaluationSettings(Section):
    """What is reported."""

    budgets: list[Annotated[float, Field(gt=0)]] = Field(
        [2.5, 3.0, 4.0],
        min_length=1,
        description="Budgets asked for, in units of cost; each is evaluated and exported.",
    )
    batch_size: int = Field(64, ge=1, description="Examples a batch.")
    shard_size: int = Field(
        16, ge=1, description="Configurations a shard; an evaluation that was killed goes on behind its last shard."
    )
    workers: int = Field(1, ge=1, le=64, description="Shards measured at a time; each worker holds a model of its own.")
    runner: Literal["threads", "processes", "dask", "ray"] = Field(
        "threads",
        description="Where shards, references and exports run: threads of this process, processes of this machine, or "
        "the workers of a Dask or Ray cluster (extras [dask], [ray]).",
    )
    address: str | None = Field(
        None,
        description="Of the Dask scheduler or the Ray cluster; without it one is started on this machine.",
    )
    harness_tasks: list[str] = Field(
        [], description="Tasks of the lm-evaluation-harness, measured for every budget (language models; extra [eval])."
    )
    harness_include: str | None = Field(None, description="Folder of own harness tasks (YAML).")
    harness_limit: int | None = Field(None, ge=1, description="At most so many examples of each harness task.")

    @model_validator(mode="after")
    def _address_of_a_cluster(self) -> EvaluationSettings:
        if self.address is not None and self.runner not in ("dask", "ray"):
            raise ValueError("an address is one of a cluster: set runner to dask or ray, or leave address out")
        return self

    @field_validator("budgets")
    @classmethod
    def _distinct(cls, budgets: list[float]) -> list[float]:
        # Folders and tables name a budget by these digits: two of one name would overwrite each other.
        if len({f"{budget:g}" for budget in budgets}) < len(budgets):
            raise ValueError("budgets must differ in their first six digits: give each of them once")
        return budgets


class ExportSettings(Section):
    """What is written for each budget."""

    base: bool = Field(True, description="Write the packed base beside the adapter.")
    adapter_dtype: Literal["float32", "float16", "bfloat16"] = Field(
        "float32", description="Type of the adapter's tensors."
    )


class TrackingSettings(Section):
    """MLflow."""

    tracking_uri: str | None = Field(None, description="MLflow server or database; by default sqlite in COALORA_HOME.")
    experiment: str = Field("coalora", min_length=1, description="Experiment name.")
    registered_model: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Name in the registry; by default coalora-<pipeline>.",
    )
    system_metrics: bool = Field(True, description="Log the load of processors, memory and GPUs while a flow runs.")

    @field_validator("tracking_uri")
    @classmethod
    def _server_or_database(cls, uri: str | None) -> str | None:
        if uri is not None and ("://" not in uri or uri.startswith("file:")):
            raise ValueError(
                "MLflow keeps no runs in folders: give a server such as http://host:5000 or a database such as "
                "sqlite:////folder/mlflow.db, or leave it out"
            )
        return uri


class VersioningSettings(Section):
    """DVC."""

    enabled: bool = Field(True, description="Add every round's configuration set to DVC.")
    push: bool = Field(False, description="Push every set to DVC's default remote as soon as it is added.")


class StageSettings(Section):
    """How Prefect treats stages that compute."""

    retries: int = Field(0, ge=0, le=10, description="Retries of a failed stage.")
    timeout_hours: float | None = Field(None, gt=0, description="A stage that takes longer fails.")
    checkpoint_seconds: float | None = Field(
        60.0,
        gt=0,
        description="Seconds between checkpoints of training, where a killed run resumes; null: between stages alone.",
    )


class RuntimeSettings(Section):
    """Where the model runs."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU where there is one.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Computing type of the base; auto is bfloat16 on a GPU, float32 on a CPU."
    )
    cache_mib: int = Field(
        512,
        ge=0,
        description="Memory for layers of configurations in use (MiB): packed and, on a CPU, weights that wait.",
    )
    master: Literal["device", "cpu", "mmap"] = Field(
        "device",
        description="Where full-precision weights live: beside the model, in RAM, or in the checkpoint's files.",
    )
    weights: Literal["dequantized", "packed"] = Field(
        "dequantized",
        description="packed keeps the target layers at their bits and dequantizes on the fly: slower, far less memory.",
    )

    processes: int = Field(1, ge=1, description="Training processes; on GPUs one each. Each takes examples of its own.")
    process_configurations: Literal["own", "same"] = Field(
        "own", description="own: each process draws a configuration of its own; same: all take one."
    )

    def resolved(self) -> RuntimeSettings:
        """The same with `auto` replaced by what this machine has: results of CPU and GPU are kept apart."""
        import torch

        from coalora.models.loading import default_device, default_dtype

        device = default_device().type if self.device == "auto" else self.device
        dtype = str(default_dtype(torch.device(device))).removeprefix("torch.") if self.dtype == "auto" else self.dtype
        return self.model_copy(update={"device": device, "dtype": dtype})


class Settings(Section):
    """One pipeline."""

    model: ModelSettings = Field(description="Base model.")
    benchmark: BenchmarkSettings = Field(description="Data and metric.")
    target_modules: list[str] | Literal["all-linear"] | None = Field(
        None,
        description="Layers to quantize: name suffixes or globs, or all-linear; by default those of the architecture.",
    )
    calibration: CalibrationSettings = Field(CalibrationSettings(), description="Calibration.")
    choices: ChoiceSettings = Field(ChoiceSettings(), description="Choice space.")
    cost: CostSettings = Field(CostSettings(), description="What budgets count.")
    adapter: AdapterSettings = Field(AdapterSettings(), description="Adapter.")
    training: TrainingSettings = Field(TrainingSettings(), description="Training.")
    baselines: BaselineSettings = Field(BaselineSettings(), description="Baselines.")
    initial_set: InitialSetSettings = Field(InitialSetSettings(), description="Initial configuration set.")
    search: SearchSettings = Field(SearchSettings(), description="Search.")
    evaluation: EvaluationSettings = Field(EvaluationSettings(), description="Evaluation.")
    export: ExportSettings = Field(ExportSettings(), description="Export.")
    tracking: TrackingSettings = Field(TrackingSettings(), description="Tracking.")
    versioning: VersioningSettings = Field(VersioningSettings(), description="Versioning.")
    storage: StorageSettings = Field(StorageSettings(), description="S3.")
    stages: StageSettings = Field(StageSettings(), description="Retries and time limits.")
    runtime: RuntimeSettings = Field(RuntimeSettings(), description="Device, number type, memory.")
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of everything that is drawn.")

    def of_the_result(self) -> Settings:
        """The same with defaults for what changes no number: where a run is kept, how its stages are cut and run."""
        default = EvaluationSettings()
        how = ("shard_size", "workers", "runner", "address")
        whole = {name: getattr(default, name) for name in how}
        return self.model_copy(
            update={
                "tracking": TrackingSettings(),
                "versioning": VersioningSettings(),
                "storage": StorageSettings(),
                "stages": StageSettings(),
                "evaluation": self.evaluation.model_copy(update=whole),
            }
        )
