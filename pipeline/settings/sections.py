"""Settings of a pipeline: typed, with units and ranges, one for the command line, DVC and the form in Prefect's UI.

Hyperparameters of the method are the library's recipes as they are (`coalora.recipes`); what is declared here is the
pipeline's own. Unknown keys are errors. Every section is the input of the stages that use it and of no other, so that
changing it runs those stages again and nothing before them.
"""

# No `from __future__ import annotations`: a field's type is read where values are checked.
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, Self, get_args
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from coalora.adapt.methods import METHODS
from coalora.calibrate.costs import UNITS, CostKind, parse_budget
from coalora.config import CoaLoraConfig
from coalora.errors import CoaloraError
from coalora.evaluate.metrics import reported_metrics
from coalora.export.formats import EXPORT_FORMATS
from coalora.quant.registry import SCHEMES
from coalora.recipes import (
    AdapterRecipe,
    AdapterType,
    CalibrationRecipe,
    Goal,
    InitialSetRecipe,
    PretrainRecipe,
    RuntimeRecipe,
    SearchRecipe,
    Task,
    Tie,
    TrainingRecipe,
    check_compile,
    check_goal,
    described,
    hyper,
    listed,
    with_unit,
)
from coalora.search.strategies import STRATEGIES
from coalora.trust import require_trust
from pipeline.scrub import has_login

BUCKET = r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"  # names that S3 allows
Allowed = dict[str, list[int | str]]
SchemeName = Annotated[str, AfterValidator(SCHEMES.check_foreign)]
_REQUIRED = ...


def setting(default: Any, title: str, help: str, **limits: Any) -> Any:
    """A field of a section; arguments as of `coalora.recipes.described`, and further ones of pydantic's `Field`."""
    made = {"default_factory" if callable(default) else "default": default}
    return Field(**made, **described(title, help, **limits))


def _of_the_config(name: str) -> Any:
    """The field of that name of `CoaLoraConfig`."""
    declared = CoaLoraConfig.__dataclass_fields__[name]
    return Field(declared.default, **declared.metadata)


class Section(BaseModel):
    """A section of the settings: unknown keys, infinite numbers, and truth values in place of numbers are errors."""

    # A value may hold a password: errors do not repeat it.
    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=(), hide_input_in_errors=True,
        # On buttons of Prefect's form.
        model_title_generator=lambda model: model.__name__.removesuffix("Settings") or "Settings",
    )  # fmt: skip

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        # Python takes true for 1, and YAML 1.1 reads yes and on as true.
        wrong = list(_truth_values(value, cls.model_fields[str(info.field_name)].annotation, ()))
        if wrong:
            raise ValidationError.from_exception_data(cls.__name__, wrong)
        return value


def _truth_values(value: Any, annotation: Any, path: tuple[int | str, ...]) -> Iterator[InitErrorDetails]:
    """True and False where a field is not of that type, in lists and recipes too."""
    if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
        problem = PydanticCustomError("truth_value", "true and false are no value of this key")
        yield InitErrorDetails(type=problem, loc=path, input=value)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _truth_values(item, None, (*path, index))
    elif isinstance(value, Mapping):
        recipe = next(filter(is_dataclass, (annotation, *get_args(annotation))), None)
        for item in fields(recipe) if recipe is not None else ():
            if item.name in value:
                yield from _truth_values(value[item.name], item.type, (*path, item.name))


class ModelSettings(Section):
    """The base model: an existing one, or one that is pre-trained first."""

    name_or_path: str | None = setting(
        None,
        "Hub id or folder",
        "Hub id or local folder of the base model, or package:NAME, an installed Python package's folder.",
    )
    gguf_file: str | None = setting(
        None, "File in GGUF", "GGUF file of that folder or repository; it is dequantized to safetensors.", min_length=1
    )
    revision: str | None = setting(None, "Revision", "Branch, tag or commit on the hub; pin one for repeatability.")
    trust_remote_code: bool = setting(
        False, "Run code that comes with the model", "Needs COALORA_TRUST_CODE=1 as well."
    )
    pretrain: PretrainRecipe | None = setting(None, "Pre-train a small decoder", "On the benchmark's text instead.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.name_or_path is None) == (self.pretrain is None):
            raise ValueError("set exactly one of model.name_or_path and model.pretrain")
        if self.trust_remote_code:
            require_trust("model.trust_remote_code would run code that comes with the model")
        if self.gguf_file is not None and self.pretrain is not None:
            raise ValueError("model.gguf_file is a file of model.name_or_path: set both, or pre-train")
        return self


class FilesSettings(Section):
    """Local files of a benchmark: csv, tsv, jsonl or parquet; for language modelling plain text as well."""

    train: str = setting(_REQUIRED, "Training file", "Its rows or documents are trained on.")
    validation: str | None = setting(
        None, "Validation file", "By default text is split off the training file; classification needs one."
    )
    search: str | None = setting(
        None, "Search file", "Guides the search; by default a part of the training file is set aside."
    )


class HubSettings(Section):
    """A data set of the hub, read through `datasets`."""

    path: str = setting(
        _REQUIRED,
        "Data set",
        "Its id, such as nyu-mll/glue or allenai/c4.",
        pattern=r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$",
    )
    name: str | None = setting(None, "Configuration of the data set", "Its configuration, such as sst2 or en.")
    revision: str | None = setting(None, "Revision", "Branch, tag or commit.")
    train_split: str = setting("train", "Training split", "Its name there.")
    validation_split: str = setting("validation", "Validation split", "Its name there.")
    streaming: bool = setting(False, "Streaming", "Read only as many rows as are used (large corpora).")


class BenchmarkSettings(Section):
    """A data set with its metric."""

    name: str = setting(_REQUIRED, "Name of the benchmark", "Name in reports.")
    task: Task = setting(_REQUIRED, "Task", "What the model is fine-tuned for.")
    builtin: Literal["pydoc-topics"] | None = setting(None, "Built-in text", "Text that comes with Python.")
    files: FilesSettings | None = setting(None, "Local files", "Instead of a data set of the hub.")
    hub: HubSettings | None = setting(None, "Data set of the hub", "Read through `datasets`.")
    text_columns: list[str] = setting(["text"], "Text columns", "One column, or a pair.", min_length=1, max_length=2)
    label_column: str = setting("label", "Label column", "Column of class indices, or of values.")
    num_labels: int = setting(
        2, "Classes", "How many; 1 is a regression on values, as of GLUE's STS-B.", ge=1, le=100_000
    )
    metric: str | None = setting(
        None,
        "Headline metric",
        "In reports: accuracy (default), f1, macro_f1 or matthews_correlation of classes, pearson "
        "(default) or spearman of values, bits_per_byte (default) or perplexity of text.",
    )
    metrics: list[str] | None = setting(
        None, "Further metrics", "Beside the headline; by default all that the task has."
    )
    max_length: int = setting(
        128, "Length of an example", "Of an example or a block of text, at most.", unit="tokens", ge=8, le=1_048_576
    )
    n_train: int | None = setting(
        None, "Training examples", "At most so many training examples or blocks.", ge=1, le=1_000_000_000
    )
    n_search: int = setting(
        256, "Search examples", "Examples that guide the search; never validation data.", ge=1, le=1_000_000_000
    )
    n_validation: int | None = setting(
        None, "Validation examples", "At most so many examples or blocks.", ge=1, le=1_000_000_000
    )
    search_fraction: float = setting(0.05, "Share for the search", "Of the documents.", gt=0, lt=1)
    validation_fraction: float = setting(0.1, "Share for validation", "Of the documents, held out.", gt=0, lt=1)
    split_seed: int = setting(
        0, "Seed of the split", "Decides which documents or examples are set aside.", ge=0, le=2_147_483_647
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(source is not None for source in (self.builtin, self.files, self.hub)) != 1:
            raise ValueError("set exactly one of benchmark.builtin, benchmark.files and benchmark.hub")
        if self.builtin and self.task != "language-modeling":
            raise ValueError("benchmark.builtin is text: set benchmark.task to language-modeling")
        if len({*self.text_columns, self.label_column}) <= len(self.text_columns) and self.task == "classification":
            raise ValueError("benchmark.text_columns and benchmark.label_column name one column twice")
        if self.files and self.task == "classification" and self.files.validation is None:
            raise ValueError("classification from files needs benchmark.files.validation")
        if self.task == "language-modeling":
            self._check_text()
        return self

    @model_validator(mode="after")
    def _metrics_apply(self) -> Self:
        reported_metrics(self.task, self.num_labels, self.metric, self.metrics)
        return self

    def data_only(self) -> Self:
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
                "benchmark.search_fraction and benchmark.validation_fraction leave no text to train on: lower them"
            )


class SchemeSettings(Section):
    """A quantization scheme, cut to the values that you allow."""

    scheme: SchemeName = setting(
        "nf",
        "Quantization scheme",
        f"One of {', '.join(SCHEMES)}, or module:name of your own.",
        json_schema_extra=listed(lambda: SCHEMES),
    )
    allow: Allowed = setting(
        dict,
        "Allowed values",
        "By field, for example bits: [2, 3, 4]; a field left out keeps all its values.",
    )


class RuleSettings(Section):
    """Other choices for some layers: schemes that replace what they had, limits that cut it."""

    layers: str = setting(_REQUIRED, "Layers", "Glob of names (*.mlp.*), or a suffix of one (lm_head).", min_length=1)
    scheme: SchemeName | None = setting(
        None, "Quantization scheme", "Scheme for these layers; none keeps what they have."
    )
    allow: Allowed = setting(dict, "Allowed values", "By field, of `scheme` or else of what the layers have.")
    also: list[SchemeSettings] = setting([], "Further schemes", "These layers may take them, too.")
    min_bits: int | None = setting(
        None, "Fewest bits", "Of a weight, by the field bits: scales are not counted.", ge=1, le=32
    )
    max_bits: int | None = setting(
        None, "Most bits", "Of a weight, by the field bits: scales are not counted.", ge=1, le=32
    )

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        limits = (self.min_bits, self.max_bits)
        if self.scheme is None and self.also:
            raise ValueError("a rule with `also` names its first scheme: set scheme as well")
        if self.scheme is None and not self.allow and limits == (None, None):
            raise ValueError("this rule changes nothing: set scheme, allow, min_bits or max_bits")
        if None not in limits and limits[0] > limits[1]:  # type: ignore[operator]
            raise ValueError(f"min_bits {self.min_bits} is above max_bits {self.max_bits}: swap them")
        return self


class ChoiceSettings(SchemeSettings):
    """The choice space: what each layer may become. Rules apply in order, each to what those before it left."""

    also: list[SchemeSettings] = setting([], "Further schemes", "Every layer may take them, too.")
    rules: list[RuleSettings] = setting([], "Rules by layer", "Other choices for some layers.")
    tie: Tie = _of_the_config("tie")


class CostSettings(Section):
    """What budgets, the search and the reports count."""

    kind: CostKind = setting(
        "average_bits",
        "Cost",
        "Bits a weight, MB (10^6 bytes) of the packed target layers (bytes) or of all that a device holds, base and "
        "adapter (file_bytes), or microseconds of a table.",
    )
    table: str | None = setting(None, "Table of latencies", "CSV of a device's latencies: layer, choice, microseconds.")

    @model_validator(mode="before")
    @classmethod
    def _kind_alone(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _latency_has_a_table(self) -> Self:
        if (self.kind == "latency") != (self.table is not None):
            raise ValueError("cost.table belongs to cost.kind latency, which needs it: set both or neither")
        return self


class BaselineSettings(Section):
    """What CoA-LoRA is compared with, on the same configurations, examples and steps."""

    methods: list[str] = setting(
        ["none", "shared"],
        "Methods over the sets",
        "Trained over the same sets: none (no adapter), shared (Shared-LoRA), paper (theta as there).",
    )
    per_budget: list[str] = setting(
        [],
        "Methods for each budget",
        "Trained for each budget's configuration alone: qlora, lq-lora (started from the error's SVD).",
    )
    per_budget_steps: int | None = setting(
        None, "Steps for each budget", "By default as the whole training.", ge=1, le=10_000_000
    )
    ceiling: Literal["base", "shared", "own"] | None = setting(
        None,
        "Adapter in full precision",
        "What full precision is measured with: nothing (base), Shared-LoRA's adapter, or its own, trained there for as "
        "many steps; by default base to recover, shared to fine-tune.",
    )

    @field_validator("methods", "per_budget")
    @classmethod
    def _trained_as_they_are(cls, methods: list[str], field: ValidationInfo) -> list[str]:
        place = {"sets": "methods", "budget": "per_budget"}
        if "coa" in methods:
            raise ValueError("leave coa out: it is what the others are compared with")
        for method in methods:
            if place[METHODS[METHODS.check_foreign(method)].over] != field.field_name:
                raise ValueError(f"move {method} to {place[METHODS[method].over]}")
        return methods

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len(set(self.methods)) < len(self.methods):
            raise ValueError("a method stands twice in baselines.methods: give each once")
        return self


@dataclass(frozen=True)
class InitialSetSettings(InitialSetRecipe):
    """Configuration set of round 0: allocations at evenly spread budgets, or a set from a file."""

    file: str | None = hyper(
        None,
        "File of a set",
        "Start with this set, as `coalora restore` writes it, instead of allocations.",
        min_length=1,
    )


class EvaluationSettings(Section):
    """What is reported."""

    budgets: list[Annotated[float, Field(gt=0, json_schema_extra=with_unit)]] = setting(
        [2.5, 3.0, 4.0],
        "Budgets",
        "In units of cost or with their unit (120MB); each is evaluated and exported. [each above 0]",
        min_length=1,
    )
    batch_size: int = setting(64, "Batch size", "Examples a batch.", ge=1, le=65_536)
    shard_size: int = setting(
        16,
        "Configurations a shard",
        "An evaluation that was killed goes on behind its last finished shard.",
        ge=1,
        le=100_000,
    )
    workers: int = setting(1, "Shards at a time", "Each worker holds a model of its own.", ge=1, le=64)
    runner: Literal["threads", "processes", "dask", "ray"] = setting(
        "threads",
        "Runner of the shards",
        "Where shards, references and exports run: threads of this process, processes of this machine, or "
        "the workers of a Dask or Ray cluster (extras [dask], [ray]).",
    )
    address: str | None = setting(
        None,
        "Address of the cluster",
        "Of the Dask scheduler or the Ray cluster; without it one is started on this machine.",
    )
    prompts: list[str] = setting(
        [],
        "Prompts",
        "Texts that the report continues at one budget without and with the adapter, and in full precision.",
        max_length=8,
    )
    prompt_budget: float | None = setting(
        None,
        "Budget of the prompts",
        "The nearest one of the budgets; by default the smallest.",
        gt=0,
        json_schema_extra=with_unit,
    )
    prompt_tokens: int = setting(40, "Tokens after a prompt", "Tokens that are generated.", ge=1, le=1024)
    harness_tasks: list[str] = setting(
        [],
        "Harness tasks",
        "Tasks of the lm-evaluation-harness, measured for every budget (language models; extra [eval]).",
    )
    harness_include: str | None = setting(
        None, "Folder of harness tasks", "Tasks of your own (YAML); needs COALORA_TRUST_CODE=1."
    )
    harness_limit: int | None = setting(
        None, "Examples of a harness task", "At most so many of each task.", ge=1, le=1_000_000_000
    )

    @field_validator("harness_include")
    @classmethod
    def _agreed_to_functions(cls, folder: str | None) -> str | None:
        if folder is not None:
            require_trust("evaluation.harness_include would run functions that the tasks in its folder name")
        return folder

    @model_validator(mode="after")
    def _address_of_a_cluster(self) -> Self:
        if self.address is not None and self.runner not in ("dask", "ray"):
            raise ValueError("an address is one of a cluster: set runner to dask or ray, or leave address out")
        return self

    @property
    def prompts_at(self) -> float:
        """The budget that prompts are continued at."""
        wanted = min(self.budgets) if self.prompt_budget is None else self.prompt_budget
        return min(self.budgets, key=lambda budget: abs(budget - wanted))

    @field_validator("budgets")
    @classmethod
    def _distinct(cls, budgets: list[float]) -> list[float]:
        # Folders and tables name a budget by these digits: two of one name would overwrite each other.
        if len({f"{budget:g}" for budget in budgets}) < len(budgets):
            raise ValueError("two budgets have the same first six digits: give each of them once")
        return budgets


class ExportSettings(Section):
    """What is written for each budget."""

    formats: list[str] = setting(
        lambda: ["peft", "packed"],
        "Formats",
        "For each budget: peft (the adapter) and packed (its quantized base), or others that are installed.",
    )
    adapter_dtype: AdapterType = setting(
        "float32",
        "Number type of adapters",
        "int8 and int4 are smaller than stock PEFT can read: for coalora.load_adapted alone; formats of other engines "
        "take float16 in their place.",
    )
    quantized: bool = setting(
        True,
        "Quantized weights in the bundle",
        "Put the weights of all choices into the bundle where calibration decided them, so that bases are made "
        "wherever the base model is; without, only where the run's store is.",
    )

    @field_validator("formats")
    @classmethod
    def _known(cls, formats: list[str]) -> list[str]:
        if "peft" not in formats:
            raise ValueError("keep peft among the formats: results count and check its adapter")
        return [EXPORT_FORMATS.check_foreign(name) for name in formats]


class TrackingSettings(Section):
    """MLflow."""

    tracking_uri: str | None = setting(
        None,
        "Address of MLflow",
        "Server or database, without a login; by default in COALORA_HOME.",
        json_schema_extra={"pattern": "^(?![A-Za-z0-9+.-]*://[^/]*@)"},  # Prefect would keep it in clear
    )
    experiment: str = setting("coalora", "Experiment", "Its name in MLflow.", min_length=1)
    registered_model: str | None = setting(
        None,
        "Registered model",
        "Name in the registry; by default coalora-<pipeline>.",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$",
    )
    system_metrics: bool = setting(True, "Load of the machine", "Log the load of processors, memory and GPUs.")

    @field_validator("tracking_uri")
    @classmethod
    def _server_or_database(cls, uri: str | None) -> str | None:
        known = ("http", "https", "sqlite", "postgresql", "mysql", "mssql")
        if uri is not None and ("://" not in uri or urlsplit(uri).scheme.partition("+")[0] not in known):
            raise ValueError(
                "MLflow keeps no runs in folders: give a server such as http://host:5000 or a database such as "
                "sqlite:////folder/mlflow.db, or leave it out"
            )
        if uri is not None and has_login(uri):
            raise ValueError(
                "leave the login out of the address, which is kept in clear: give it by MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN; a database with a password by MLFLOW_TRACKING_URI"
            )
        return uri


class VersioningSettings(Section):
    """DVC."""

    enabled: bool = setting(True, "Version sets with DVC", "Add every round's configuration set to DVC.")
    push: bool = setting(False, "Push sets", "Push every set to DVC's default remote as soon as it is added.")


class StorageSettings(Section):
    """S3: whether a run is published there, and how the server is reached.

    Credentials have no place here: boto3 finds them by itself. What is left out is taken from the usual variables and
    files of AWS: `AWS_ENDPOINT_URL_S3`, `AWS_ENDPOINT_URL`, `AWS_REGION`, `AWS_DEFAULT_REGION`, `AWS_PROFILE`,
    `~/.aws/config`.
    """

    publish: bool = setting(False, "Publish runs", "Publish adapters, packed bases, bundle and report of a run to S3.")
    bucket: str | None = setting(None, "Bucket", "It must exist already.", pattern=f"^{BUCKET}$")
    prefix: str = setting("", "Prefix of keys", "Start of every key in the bucket, for example team/coalora.")
    endpoint_url: str | None = setting(
        None,
        "Address of S3",
        "Server, for example http://127.0.0.1:9000; by default AWS_ENDPOINT_URL_S3, else AWS itself.",
    )
    region: str | None = setting(None, "Region", "By default AWS_REGION or the profile's.")
    profile: str | None = setting(None, "Profile", "Of ~/.aws, where credentials come from; by default AWS_PROFILE.")
    attempts: int = setting(5, "Attempts of a request", "Where network or server fail.", ge=1, le=20)
    timeout_seconds: float = setting(
        30.0, "Timeout", "Longest wait for the next bytes.", unit="seconds", gt=0, le=86_400
    )
    part_mib: int = setting(16, "Size of a part", "Larger files travel in parts.", unit="MiB", ge=5, le=512)
    workers: int = setting(4, "Transfers at a time", "Parts or files under way at a time.", ge=1, le=64)

    @field_validator("prefix")
    @classmethod
    def _plain_prefix(cls, prefix: str) -> str:
        prefix = prefix.strip("/")
        if any(part in ("", ".", "..") for part in prefix.split("/")) and prefix:
            raise ValueError("give names joined by single slashes, none of them . or ..")
        return prefix

    @field_validator("endpoint_url")
    @classmethod
    def _no_credentials(cls, url: str | None) -> str | None:
        if url is None:
            return None
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("write an endpoint as http://host:port or https://host")
        if "@" in parts.netloc or parts.query:
            # The value itself is in pydantic's message: it must not be repeated there.
            raise ValueError("leave credentials out of the address: give them by AWS_PROFILE or AWS_ACCESS_KEY_ID")
        return url.rstrip("/")

    @model_validator(mode="after")
    def _bucket_to_publish_in(self) -> Self:
        if self.publish and self.bucket is None:
            raise ValueError("storage.publish needs storage.bucket")
        return self


def storage_settings(base: StorageSettings | None, changes: Mapping[str, Any]) -> StorageSettings:
    """`base` (or the defaults) with `changes`, checked.

    Raises:
        CoaloraError: a value that does not fit; the value is not repeated, since it may hold a password.
    """
    start = base.model_dump() if base is not None else {}
    try:
        return StorageSettings.model_validate({**start, **changes})
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, p['loc']))}: {p['msg']}" for p in error.errors(include_url=False))
        raise CoaloraError(f"Wrong settings of S3: {problems}", remedy="Correct the option") from error


class StageSettings(Section):
    """How Prefect treats stages that compute."""

    retries: int = setting(0, "Retries of a stage", "Where it fails.", ge=0, le=10)
    timeout_hours: float | None = setting(
        None, "Time limit of a stage", "Longer ones fail.", unit="hours", gt=0, le=100_000
    )
    checkpoint_seconds: float | None = setting(
        60.0,
        "Time between checkpoints",
        "Of training, where a killed run resumes; null: between stages alone.",
        unit="seconds",
        gt=0,
        le=1_000_000,
    )


@dataclass(frozen=True)
class RuntimeSettings(RuntimeRecipe):
    """Device, number type and memory of the model, and the processes that train it."""

    processes: int = hyper(1, "Training processes", "On GPUs one each. Each takes examples of its own.", ge=1, le=1024)
    process_configurations: Literal["own", "same"] = hyper(
        "own",
        "Configurations of the processes",
        "own: each process draws a configuration of its own; same: all take one.",
    )


_BUDGETS = {"evaluation": ("budgets", "prompt_budget"), "initial_set": ("min_budget", "max_budget")}


class Settings(Section):
    """One pipeline."""

    model: ModelSettings = setting(_REQUIRED, "Model", "Base model.")
    benchmark: BenchmarkSettings = setting(_REQUIRED, "Benchmark", "Data and metric.")
    goal: Goal = _of_the_config("goal")
    target_modules: list[str] | Literal["all-linear"] | None = _of_the_config("target_modules")
    calibration: CalibrationRecipe = setting(CalibrationRecipe(), "Calibration", "Measurement of the layers.")
    choices: ChoiceSettings = setting(ChoiceSettings(), "Choices", "Choice space.")
    cost: CostSettings = setting(CostSettings(), "Cost", "What budgets count.")
    adapter: AdapterRecipe = setting(AdapterRecipe(), "Adapter", "LoRA, theta, and pairs for low bit-widths.")
    training: TrainingRecipe = setting(TrainingRecipe(), "Training", "Steps, learning rates and objective.")
    baselines: BaselineSettings = setting(BaselineSettings(), "Baselines", "Methods to compare with.")
    initial_set: InitialSetSettings = setting(InitialSetSettings(), "Initial set", "Configuration set of round 0.")
    search: SearchRecipe = setting(SearchRecipe(), "Search", "Strategy, rounds and sizes of the Pareto search.")
    evaluation: EvaluationSettings = setting(EvaluationSettings(), "Evaluation", "Budgets and reports.")
    export: ExportSettings = setting(ExportSettings(), "Export", "Files for each budget.")
    tracking: TrackingSettings = setting(TrackingSettings(), "Tracking", "MLflow's address, experiment and registry.")
    versioning: VersioningSettings = setting(VersioningSettings(), "Versioning", "Configuration sets in DVC.")
    storage: StorageSettings = setting(StorageSettings(), "Storage", "Publishing to S3.")
    stages: StageSettings = setting(StageSettings(), "Stages", "Retries and time limits.")
    runtime: RuntimeSettings = setting(RuntimeSettings(), "Runtime", "Device, number type, memory.")
    seed: int = _of_the_config("seed")

    @model_validator(mode="before")
    @classmethod
    def _budgets_in_units_of_cost(cls, data: Any) -> Any:
        """Budgets that name their unit, as numbers; what is no text is left to its own field."""
        cost = data.get("cost") if isinstance(data, Mapping) else None
        kind = cost.get("kind", "average_bits") if isinstance(cost, Mapping) else getattr(cost, "kind", cost)
        kind = next((known for known in UNITS if known == (kind or "average_bits")), None)
        if kind is None or not isinstance(data, Mapping):
            return data
        wrong: list[InitErrorDetails] = []

        def read(value: Any, *path: int | str) -> Any:
            if isinstance(value, list):
                return [read(item, *path, index) for index, item in enumerate(value)]
            try:
                return parse_budget(value, kind) if isinstance(value, str) else value
            except CoaloraError as error:
                words = PydanticCustomError("budget", "{told}", {"told": error.remedy})
                wrong.append(InitErrorDetails(type=words, loc=path, input=value))

        changed = dict(data)
        for section, keys in _BUDGETS.items():
            if isinstance(own := data.get(section), Mapping):
                changed[section] = {**own, **{k: read(own[k], section, k) for k in keys if k in own}}
        if wrong:
            raise ValidationError.from_exception_data(cls.__name__, wrong)
        return changed

    @model_validator(mode="after")
    def _goal_can_be_met(self) -> Self:
        check_goal(self.goal, self.benchmark.task)
        check_compile(self.runtime, self.adapter, self.training)
        needed = {"base": "none", "shared": "shared"}.get(self.ceiling)
        if self.ceiling == "base" and self.benchmark.task != "language-modeling":
            raise ValueError("a classifier's base has no trained head: set baselines.ceiling to own or shared")
        if needed is not None and needed not in self.baselines.methods:
            what = {"none": "without an adapter", "shared": "with Shared-LoRA's adapter"}[needed]
            raise ValueError(
                f"full precision is measured {what}: add {needed} to baselines.methods, or set baselines.ceiling to own"
            )
        return self

    @property
    def ceiling(self) -> Literal["base", "shared", "own"]:
        """What full precision is measured with, decided."""
        return self.baselines.ceiling or ("base" if self.goal == "recover" else "shared")

    @property
    def own_reference(self) -> bool:
        """Whether KL divergence and agreement are those with full precision as it has learnt the task, or else with the
        base."""
        language = self.benchmark.task == "language-modeling"
        return language and self.goal == "fine-tune" and self.ceiling == "own"

    @field_validator("search")
    @classmethod
    def _agreed_to_the_strategy(cls, recipe: SearchRecipe) -> SearchRecipe:
        STRATEGIES.check_foreign(recipe.strategy)
        return recipe

    def of_the_result(self) -> Self:
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
