"""CoA-LoRA on one model: calibrate, fit, switch to any budget, save what answers every budget.

The steps are those of `coalora.method`; this module holds what they share (base model, tokenizer, tables, adapter).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from coalora.adapt.adapted import AdaptedModel
from coalora.calibrate.calibrate import calibrate
from coalora.calibrate.tables import CalibrationTables
from coalora.config import CoaLoraConfig
from coalora.configurations import ConfigurationSet
from coalora.data.benchmark import Split
from coalora.data.build import example_split, text_split
from coalora.data.classification import check_classes, to_examples
from coalora.errors import CoaloraError
from coalora.evaluate.losses import LossMeter, Score, measure_configurations
from coalora.evaluate.reference import Reference
from coalora.export.bundle import Bundle
from coalora.export.formats import DEFAULT_FORMATS, ExportSource, write_export
from coalora.method.initial import initial_set
from coalora.method.loop import Fitted, fit
from coalora.method.selection import select_budgets
from coalora.models.files import model_digest, model_folder
from coalora.models.loading import load_config, load_model, load_tokenizer, resolved
from coalora.models.targets import find_target_layers
from coalora.quant.scheme import InputStatistics
from coalora.recipes import Task, check_goal
from coalora.train.loop import ASIDE

T = TypeVar("T")
Progress = Callable[[str], Callable[..., None]]
Data = Split | Sequence[str] | tuple[Sequence[str], Sequence[int | float]]


class CoaLoraModel:
    """A base model with one adapter for all configurations; made by `from_pretrained`.

    Attributes:
        base: the base model (wrapped by PEFT from `fit` on).
        tokenizer: of the base model.
        config: hyperparameters.
        tables, statistics: what `calibrate` measured. Replace `tables` for a budget in bytes or microseconds
            (`coalora.calibrate.costs`).
        adapted: base, adapter and theta as one model, from `fit` on.
        fitted: records of `fit`.
        members: the final configuration set with its losses.

    Example:
        >>> from coalora import ChoiceSpace, CoaLoraConfig, CoaLoraModel
        >>> space = ChoiceSpace("nf", bits=[2, 3, 4], scale_bits=[8], scale_dtype=["bf16"], block_size=[64])
        >>> model = CoaLoraModel.from_pretrained(base_folder, CoaLoraConfig(r=4, choices=space), max_length=16)
        >>> tables = model.calibrate(train_texts)
        >>> fitted = model.fit(train_texts, search_texts, steps=4, rounds=1)
        >>> model.switch(budget=3.5)
        >>> model(**model.tokenizer("a text", return_tensors="pt")).logits.shape[1] > 0
        True
        >>> model.save_pretrained(folder / "bundle")
        >>> CoaLoraModel.load_bundle(folder / "bundle").adapt(budget=3.5).save_pretrained(folder / "adapter")
    """

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: CoaLoraConfig,
        *,
        task: Task,
        folder: Path,
        name: str,
        max_length: int,
        device: torch.device,
        load: Callable[[], PreTrainedModel],
        trust_remote_code: bool,
    ) -> None:
        self.base, self.tokenizer, self.config, self.task = base, tokenizer, config, task
        self.folder, self.name, self.max_length = folder, name, max_length
        self.device, self._load, self.trust_remote_code = device, load, trust_remote_code
        self.base_digest = model_digest(folder)
        self.layers = find_target_layers(base, config.target_modules)
        self._tables: CalibrationTables | None = None
        self.statistics: list[InputStatistics] = []
        self._adapted: AdaptedModel | None = None
        self.fitted: Fitted | None = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        config: CoaLoraConfig | None = None,
        *,
        task: Task = "language-modeling",
        num_labels: int | None = None,
        max_length: int = 128,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> CoaLoraModel:
        """Load a base model in full precision, and its tokenizer.

        Args:
            name_or_path: local folder or hub id.
            config: hyperparameters; those that are left out are what won in docs/results.md.
            num_labels: of a classifier; 1 is a regression.
            max_length: tokens of an example or block, where texts are given.

        Raises:
            CoaloraError: the model cannot be found, is none for the task, or has no target layers.
        """
        config = config or CoaLoraConfig()
        check_goal(config.goal, task)
        folder = model_folder(name_or_path, revision)
        runtime = resolved(config)
        device = torch.device(runtime.device)
        tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
        load = partial(
            load_model, folder, task, num_labels=num_labels, dtype=getattr(torch, runtime.dtype), seed=config.seed,
            trust_remote_code=trust_remote_code, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        # Packed layers need not fit the device in full precision.
        base = load(device=torch.device("cpu") if config.weights == "packed" else device)
        # What stock PEFT finds the base by.
        name = str(folder.resolve()) if Path(name_or_path).is_dir() else str(name_or_path)
        return cls(
            base, tokenizer, config, task=task, folder=folder, name=name, max_length=max_length, device=device,
            load=partial(load, device=device), trust_remote_code=trust_remote_code,
        )  # fmt: skip

    @property
    def tables(self) -> CalibrationTables:
        """Calibration tables.

        Raises:
            CoaloraError: before `calibrate`.
        """
        return _made(self._tables, "is not calibrated", "calibrate(train)")

    @tables.setter
    def tables(self, tables: CalibrationTables) -> None:
        self._tables = tables

    @property
    def adapted(self) -> AdaptedModel:
        """Base, adapter and theta as one model.

        Raises:
            CoaloraError: before `fit`.
        """
        return _made(self._adapted, "has no adapter yet", "fit(train, search)")

    @property
    def members(self) -> ConfigurationSet:
        """The final configuration set with its losses.

        Raises:
            CoaloraError: before `fit`.
        """
        return _made(self.fitted, "has no configuration set yet", "fit(train, search)").members

    def split(self, data: Data) -> Split:
        """Tokenized examples of texts (joined and cut into blocks), or of (texts, labels) for a classifier.

        Raises:
            CoaloraError: no text, or labels that are none of the task.
        """
        if isinstance(data, Split):
            return data
        if self.task == "language-modeling":
            return text_split([str(text) for text in data], self.tokenizer, max_length=self.max_length)
        if not (isinstance(data, tuple) and len(data) == 2):
            raise CoaloraError("A classifier learns from texts with labels", remedy="Give (texts, labels)")
        texts, labels = data
        classes = cast(int, self.base.config.num_labels)
        examples = to_examples([(str(text),) for text in texts], list(labels), "data", regression=classes == 1)
        check_classes(examples, classes, "data")
        return example_split(examples, self.tokenizer, max_length=self.max_length)

    def calibrate(
        self, data: Data, *, progress: Progress | None = None, checkpoint_dir: Path | str | None = None
    ) -> CalibrationTables:
        """Measure what every choice costs and breaks in every target layer, over examples at equal distances in `data`.

        `config.calibration.n_samples` of them; all, where there are fewer.

        Args:
            progress: makes a listener (done, total) for what is named.
            checkpoint_dir: folder from which the same call on a large model goes on if it broke off; its statistics are
                read from there.
        """
        if self._adapted is not None:
            raise CoaloraError("The base model is quantized already", remedy="Calibrate before fit")
        split, recipe = self.split(data), self.config.calibration
        recipe = replace(recipe, n_samples=min(recipe.n_samples, len(split)))
        self._tables, self.statistics = calibrate(
            self.base, self.layers, split, self.config.choices, recipe, base_digest=self.base_digest,
            tie=self.config.tie, tokenizer=self.tokenizer,
            rest_dtype=getattr(load_config(self.folder, trust_remote_code=self.trust_remote_code), "dtype", None),
            device=self.device, checkpoint_dir=None if checkpoint_dir is None else Path(checkpoint_dir),
            progress=progress,
        )  # fmt: skip
        return self._tables

    def fit(
        self,
        train: Data,
        search: Data,
        *,
        steps: int | None = None,
        rounds: int | None = None,
        initial: ConfigurationSet | None = None,
        budgets: Sequence[float] = (),
        progress: Progress | None = None,
        checkpoint_dir: Path | str | None = None,
    ) -> Fitted:
        """Train over a set of configurations, and let a Pareto search improve it, round by round.

        Args:
            train: what is learnt.
            search: what guides the search; nothing is trained on it.
            steps: training steps in all, of which the initial set gets three shares and each round one; None takes
                `config.training`.
            rounds: search rounds; None takes `config.search`.
            initial: the set of round 0; None makes `initial_set`.
            budgets: budgets that will be asked for: more is measured for them at the end.
            progress: makes a listener (done, total, **values) for what is named.
            checkpoint_dir: folder from which the same call on the same model goes on if it broke off.
        """
        config, tables = self.config, self.tables
        recipe = config.search if rounds is None else replace(config.search, rounds=rounds)
        training = config.training.resolved(config.goal, self.task)
        reference = Reference() if config.goal == "recover" else None
        if steps is not None:
            share = max(1, steps // (recipe.rounds + 3))
            training = replace(training, initial_steps=steps - recipe.rounds * share, round_steps=share)
        members = initial_set(tables, config.initial_set) if initial is None else initial
        if self._adapted is None:
            self._adapted = self._attach()
        data = self.split(search)
        self.fitted = fit(
            self._adapted,
            self.split(train),
            data,
            members,
            tables,
            training=training,
            search=recipe,
            seed=config.seed,
            reference=reference,
            progress=progress,
            checkpoint_dir=checkpoint_dir,
            compile=config.compile,
        )
        meter = LossMeter(self._adapted, data, recipe.batch_size, progress, reference=reference)
        final, selected = select_budgets(meter, self.fitted.members, tables, budgets)
        self.fitted.members = final.merge(selected).distinct().sorted(tables)
        return self.fitted

    def _attach(self) -> AdaptedModel:
        config = self.config
        return AdaptedModel(
            self.base,
            self.layers,
            self.tables.space,
            self.task,
            method="coa",
            recipe=config.adapter,
            seed=config.seed,
            statistics=self.statistics,
            cache_bytes=config.cache_bytes,
            master=config.master,
            weights=config.weights,
            checkpoint=self.folder if config.master == "mmap" else None,
            device=self.device if config.weights == "packed" else None,
        )

    def switch(self, configuration: np.ndarray | None = None, *, budget: float | str | None = None) -> None:
        """Quantize to a configuration (N,), or to the best one within a budget (by default in average bits), and adapt.

        Raises:
            CoaloraError: both or none are given, or the budget is below what any configuration can reach.
        """
        if (configuration is None) == (budget is None):
            raise CoaloraError("switch takes a configuration or a budget", remedy="Give exactly one of them")
        with torch.no_grad():
            self.adapted.switch(self.bundle().select(budget) if budget is not None else np.asarray(configuration))
        self.adapted.peft_model.eval()

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """The model's output at the configuration that it holds."""
        return self.adapted.peft_model(*args, **inputs)

    def generate(self, *args: Any, **options: Any) -> Any:
        """Text of a language model at the configuration that it holds; as in transformers."""
        return self.adapted.peft_model.generate(*args, **options)

    def evaluate(self, data: Data, *, batch_size: int | None = None) -> Score:
        """Loss and metrics at the configuration that the model holds.

        Of a language model also its KL divergence from the base in full precision, and their top-1 agreement.
        """
        held = self.adapted.base.configuration.copy()
        (found,) = measure_configurations(
            self.adapted,
            self.split(data),
            held[None],
            batch_size=batch_size or self.config.search.batch_size,
            reference=Reference(),
        )
        return found

    def bundle(self) -> Bundle:
        """Everything that answers a budget, without the base model."""
        adapted, members = self.adapted, self.members
        factors = adapted.compensation.factors(members.configurations) if adapted.compensation else None
        tensors = {k: v for k, v in adapted.state_dict().items() if not k.startswith(ASIDE)}
        return Bundle(
            self.tables, members, tensors, self.config.adapter, self.task, base_model=self.name,
            num_labels=self.base.config.num_labels if self.task == "classification" else None, seed=self.config.seed,
            dtype=str(self.base.dtype).removeprefix("torch."), compensation=factors, statistics=self.statistics or None,
        )  # fmt: skip

    def save_pretrained(self, folder: Path | str, *, quantized: bool = True) -> None:
        """Write the bundle, from which `load_bundle` answers any budget.

        Args:
            quantized: as in `Bundle.save`: with the quantized weights of all choices, or a few megabytes.
        """
        self.bundle().save(folder, quantized=quantized)

    @staticmethod
    def load_bundle(folder: Path | str) -> Bundle:
        """Read what `save_pretrained` wrote; adapters need no base model (`coalora.export_for` does)."""
        return Bundle.load(folder)

    def export(self, folder: Path | str, *, budget: float | str, formats: Sequence[str] = DEFAULT_FORMATS) -> None:
        """Write what a device gets for a budget: `configuration.json` and a folder for each format.

        `coalora.load_adapted(folder / "base", folder / "adapter")` runs the default ones.

        Args:
            formats: names of `coalora.EXPORT_FORMATS`.
        """
        source = ExportSource(
            self.bundle().adapt(budget),
            self.tables,
            self.task,
            load_config(self.folder, trust_remote_code=self.trust_remote_code),
            load_model=self._load,  # the resident model holds quantized weights
            load_tokenizer=lambda: self.tokenizer,
            load_statistics=lambda: self.statistics,
        )
        write_export(folder, formats, source)


def _made(value: T | None, problem: str, step: str) -> T:
    if value is None:
        raise CoaloraError(f"The model {problem}", remedy=f"Call {step} first")
    return value
