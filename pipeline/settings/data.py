"""Settings of the base model and of the benchmark, and what all sections of settings have in common."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from coalora.errors import CoaloraError
from coalora.evaluate.metrics import reported_metrics
from pipeline.settings.titles import describe_ranges, field_title, model_title

Fraction = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    """A section of the settings: unknown keys, infinite numbers, and truth values in place of numbers are errors."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        field_title_generator=field_title,
        model_title_generator=model_title,
        json_schema_extra=describe_ranges,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        # Python takes true for 1, and YAML 1.1 reads yes and on as true.
        values = value if isinstance(value, list) else [value]
        expected = cls.model_fields[str(info.field_name)].annotation
        if expected is not bool and any(isinstance(v, bool) for v in values):
            raise ValueError("true and false are no value of this key")
        return value


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
    label_column: str = Field("label", description="Column of class indices, or of values.")
    num_labels: int = Field(2, ge=1, description="Number of classes; 1 is a regression on values, as of GLUE's STS-B.")
    metric: str | None = Field(
        None,
        description="Headline of reports: accuracy (default), f1, macro_f1 or matthews_correlation of classes, pearson "
        "(default) or spearman of values, bits_per_byte (default) or perplexity of text.",
    )
    metrics: list[str] | None = Field(None, description="Further metrics in reports; by default all that apply.")
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
        if self.task == "language-modeling":
            self._check_text()
        return self

    @model_validator(mode="after")
    def _metrics_apply(self) -> BenchmarkSettings:
        try:
            reported_metrics(self.task, self.num_labels, self.metric, self.metrics)
        except CoaloraError as error:
            raise ValueError(str(error)) from error
        return self

    def data_only(self) -> BenchmarkSettings:
        """The same without the metrics, which change no example: for the stages that read examples."""
        return self.model_copy(update={"metric": None, "metrics": None})

    def _check_text(self) -> None:
        if len(self.text_columns) != 1:
            raise ValueError("language-modeling reads one column: give benchmark.text_columns a single name")
        if self.hub and self.hub.streaming and None in (self.n_train, self.n_validation):
            raise ValueError("a streamed corpus needs limits: set benchmark.n_train and benchmark.n_validation")
        split_off = [self.search_fraction] if self.files is None or self.files.search is None else []
        if self.hub is None and (self.files is None or self.files.validation is None):
            split_off.append(self.validation_fraction)
        if sum(split_off) >= 1:
            raise ValueError(
                "benchmark.search_fraction and benchmark.validation_fraction must leave text to train on: lower them"
            )
