"""Settings of a pipeline: typed, with units and ranges, the same for the command line, DVC and the form in Prefect's UI.

Unknown keys are errors. Every section is the input of the stages that use it and of no other, so that changing it runs
those stages again and nothing before them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Fraction = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class PretrainSettings(Section):
    """A small Llama decoder trained from scratch on the benchmark's training text."""

    hidden_size: int = Field(128, ge=8, description="Width of the decoder.")
    intermediate_size: int = Field(384, ge=8, description="Width of its MLP.")
    num_hidden_layers: int = Field(4, ge=1, description="Transformer blocks.")
    num_attention_heads: int = Field(4, ge=1, description="Attention heads.")
    vocab_size: int = Field(512, ge=260, description="Tokens of the byte-level BPE tokenizer.")
    max_length: int = Field(128, ge=8, description="Tokens a training block.")
    steps: int = Field(600, ge=1, description="Training steps.")
    batch_size: int = Field(16, ge=1, description="Blocks a step.")
    lr: float = Field(3e-3, gt=0, description="Peak learning rate.")


class ModelSettings(Section):
    """The base model: an existing one, or one that is pre-trained first."""

    name_or_path: str | None = Field(None, description="Hub id or local folder of the base model.")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub; pin a commit for repeatability.")
    trust_remote_code: bool = Field(False, description="Run code that comes with the model. Off unless you read it.")
    pretrain: PretrainSettings | None = Field(None, description="Pre-train a small decoder instead.")

    @model_validator(mode="after")
    def _one_source(self) -> ModelSettings:
        if (self.name_or_path is None) == (self.pretrain is None):
            raise ValueError("set exactly one of model.name_or_path and model.pretrain")
        return self


class FilesSettings(Section):
    """Local files of a benchmark: csv, tsv, jsonl or parquet for classification, plain text for language modelling."""

    train: str = Field(description="Training file.")
    validation: str | None = Field(None, description="Validation file; text may be split off the training file.")
    search: str | None = Field(None, description="File that guides the search; else a part of train is set aside.")


class HubSettings(Section):
    """A data set of the hub, read through `datasets`."""

    path: str = Field(description="Data set id, such as nyu-mll/glue or allenai/c4.")
    name: str | None = Field(None, description="Its configuration, such as sst2 or en.")
    revision: str | None = Field(None, description="Branch, tag or commit.")
    train_split: str = Field("train", description="Name of the training split.")
    validation_split: str = Field("validation", description="Name of the validation split.")
    streaming: bool = Field(False, description="Read only as many rows as are used (large corpora).")


class BenchmarkSettings(Section):
    """A data set with its metric."""

    name: str = Field(description="Name in reports.")
    task: Literal["classification", "language-modeling"] = Field(description="What the model is fine-tuned for.")
    builtin: Literal["pydoc-topics"] | None = Field(None, description="Text that comes with Python.")
    files: FilesSettings | None = Field(None, description="Local files.")
    hub: HubSettings | None = Field(None, description="Data set of the hub.")
    text_columns: list[str] = Field(["text"], min_length=1, max_length=2, description="One text column, or a pair.")
    label_column: str = Field("label", description="Column of class indices.")
    num_labels: int = Field(2, ge=2, description="Number of classes.")
    max_length: int = Field(128, ge=8, description="Tokens an example or block.")
    n_train: int | None = Field(None, ge=1, description="At most so many training examples or blocks.")
    n_search: int = Field(256, ge=1, description="Examples or blocks that guide the search; never validation data.")
    n_validation: int | None = Field(None, ge=1, description="At most so many validation examples or blocks.")
    search_fraction: Fraction = Field(0.05, description="Share of documents set aside for the search (text).")
    validation_fraction: Fraction = Field(0.1, description="Share of documents held out where no file is given (text).")
    split_seed: int = Field(0, ge=0, description="Decides which documents or examples are set aside.")

    @model_validator(mode="after")
    def _one_source(self) -> BenchmarkSettings:
        if sum(source is not None for source in (self.builtin, self.files, self.hub)) != 1:
            raise ValueError("set exactly one of benchmark.builtin, benchmark.files and benchmark.hub")
        if self.builtin and self.task != "language-modeling":
            raise ValueError("benchmark.builtin is text: set benchmark.task to language-modeling")
        if self.files and self.task == "classification" and self.files.validation is None:
            raise ValueError("classification from files needs benchmark.files.validation")
        return self


class CalibrationSettings(Section):
    """How the base model's layers are measured."""

    n_samples: int = Field(64, ge=1, description="Training examples or blocks run through the model.")
    batch_size: int = Field(16, ge=1, description="Examples a batch.")


class ChoiceSettings(Section):
    """The choice space: a quantization scheme, cut to the values that you allow."""

    scheme: str = Field("nf", description="Quantization scheme.")
    allow: dict[str, list[int | str]] = Field(
        default_factory=dict,
        description="Allowed values by field, for example bits: [2, 3, 4]; a field left out keeps all its values.",
    )


class AdapterSettings(Section):
    """LoRA and the configuration-aware model theta."""

    r: int = Field(16, ge=1, description="LoRA rank.")
    lora_alpha: int = Field(16, ge=1, description="LoRA scale s = lora_alpha / r.")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before lora_A.")
    embedding_dim: int = Field(8, ge=1, description="Size of each embedding of theta.")
    hidden_dim: int = Field(128, ge=1, description="Hidden width of theta.")


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
    sampling: Literal["uniform", "low-bits"] = Field(
        "low-bits",
        description="How a step draws its configuration; low-bits spends more steps where most is lost.",
    )
    sampling_power: float = Field(2.5, ge=1, description="Strength of low-bits; 1 is uniform.")


class InitialSetSettings(Section):
    """The configuration set of round 0: allocations at evenly spread budgets."""

    size: int = Field(50, ge=2, description="Number of budgets.")
    min_bits: float | None = Field(None, gt=0, description="Smallest budget; by default the space's.")
    max_bits: float | None = Field(None, gt=0, description="Largest budget; by default the space's.")


class SearchSettings(Section):
    """The Pareto search over configurations."""

    rounds: int = Field(2, ge=0, description="Search rounds, each followed by training.")
    candidates: int = Field(8, ge=1, description="Configurations proposed and evaluated a round.")
    restarts: int = Field(8, ge=1, description="Starts of the hill climbing for each proposal.")
    max_steps: int = Field(50, ge=1, description="Moves of one climb at most.")
    delta: int = Field(1, ge=1, description="A neighbour differs in one field by at most so many steps.")
    segments: int = Field(40, ge=1, description="U: bit segments that each keep their non-dominated members.")
    batch_size: int = Field(64, ge=1, description="Examples a batch when losses are measured.")


class EvaluationSettings(Section):
    """What is reported."""

    budgets: list[Annotated[float, Field(gt=0)]] = Field(
        [2.5, 3.0, 4.0], min_length=1, description="Average bits asked for; each is evaluated and exported."
    )
    batch_size: int = Field(64, ge=1, description="Examples a batch.")


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
    registered_model: str | None = Field(None, description="Name in the registry; by default coalora-<pipeline>.")


class VersioningSettings(Section):
    """DVC."""

    enabled: bool = Field(True, description="Add every round's configuration set to DVC.")


class StageSettings(Section):
    """How Prefect treats stages that compute."""

    retries: int = Field(0, ge=0, le=10, description="Retries of a failed stage.")
    timeout_hours: float | None = Field(None, gt=0, description="A stage that takes longer fails.")


class RuntimeSettings(Section):
    """Where the model runs."""

    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto takes a GPU where there is one.")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Computing type of the base; auto is bfloat16 on a GPU, float32 on a CPU."
    )
    cache_mib: int = Field(256, ge=0, description="Memory for dequantized weights that are in use (MiB).")

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
    target_modules: list[str] | None = Field(
        None,
        description="Name suffixes or globs of the layers to quantize; by default those of the model's family.",
    )
    calibration: CalibrationSettings = Field(CalibrationSettings(), description="Calibration.")
    choices: ChoiceSettings = Field(ChoiceSettings(), description="Choice space.")
    adapter: AdapterSettings = Field(AdapterSettings(), description="Adapter.")
    training: TrainingSettings = Field(TrainingSettings(), description="Training.")
    initial_set: InitialSetSettings = Field(InitialSetSettings(), description="Initial configuration set.")
    search: SearchSettings = Field(SearchSettings(), description="Search.")
    evaluation: EvaluationSettings = Field(EvaluationSettings(), description="Evaluation.")
    export: ExportSettings = Field(ExportSettings(), description="Export.")
    tracking: TrackingSettings = Field(TrackingSettings(), description="Tracking.")
    versioning: VersioningSettings = Field(VersioningSettings(), description="Versioning.")
    stages: StageSettings = Field(StageSettings(), description="Retries and time limits.")
    runtime: RuntimeSettings = Field(RuntimeSettings(), description="Device, number type, memory.")
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of everything that is drawn.")
