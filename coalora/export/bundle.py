"""Bundle: everything that answers a budget, without the base model.

Shared pair, theta, head, calibration tables and the final configuration set: a few megabytes from which the
configuration and the adapter of any budget follow in milliseconds, in one or two where its layers' choices were asked
for before (`Bundle.prepare` asks for all). Where calibration decided more than tables, its
statistics and the quantized weights of all choices travel along, so that any machine that has the base model makes the
same quantized bases, byte for byte. `bundle.json` holds the sha256 of every file.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import LoraConfig
from torch import Tensor

from coalora.adapt.effective import fold
from coalora.adapt.experts import NO_EXPERT, adjusted_choices, cascaded, expert_of_choice, used_ranks
from coalora.adapt.lora import lora_config
from coalora.adapt.theta import ConfigurationAwareModel
from coalora.cache import ByteCache, nbytes, share_of_free_memory
from coalora.calibrate.costs import CostKind, parse_budget
from coalora.calibrate.latency import read_latency
from coalora.calibrate.statistics import QUANTIZED, STATISTICS, load_statistics, save_statistics
from coalora.calibrate.tables import CalibrationTables
from coalora.configurations import ConfigurationSet, configuration_dict, configuration_digest
from coalora.errors import CoaloraError
from coalora.export.adapter import adapter_nbytes, peft_key, write_adapter
from coalora.export.base import CONFIGURATION
from coalora.files import (
    check_files,
    file_digests,
    file_sha256,
    read_json,
    read_tensors,
    reading,
    write_json,
    write_tensors,
)
from coalora.quant.scheme import InputStatistics
from coalora.recipes import AdapterRecipe, Task
from coalora.search.budget import best_within

HEADER = "bundle.json"
FILES = ("adapter.safetensors", "configurations.json", "tables.safetensors")
CALIBRATION = (STATISTICS, QUANTIZED)  # in a bundle whose bases need more than the base model
_FORMAT = "coalora-bundle/3"
_ABOUT = ("task", "base_model", "num_labels", "seed", "dtype", "adapter_dtype")
_COMPENSATION = "compensation."


@dataclass(frozen=True)
class Adapted:
    """A configuration and the adapter for it.

    Attributes:
        average_bits: stored bits a weight of the target layers.
        choices: (N,) choice indices.
        content: `configuration_dict` with `average_bits` and the `digest` of the quantized base it is for.
        config: PEFT's config of the adapter.
        tensors: the adapter under PEFT's names; other adapters of the bundle share their memory, so that who writes
            into one takes a copy first.
    """

    average_bits: float
    choices: np.ndarray
    content: dict[str, Any]
    config: LoraConfig
    tensors: dict[str, Tensor]

    @property
    def digest(self) -> str:
        """Digest of the quantized base that the adapter is for."""
        return self.content["digest"]

    @property
    def configuration(self) -> dict[str, dict]:
        """Layer name -> choice."""
        return self.content["layers"]

    def save_pretrained(self, folder: Path | str, *, dtype: torch.dtype = torch.float32) -> None:
        """Write a PEFT adapter folder, which stock `PeftModel.from_pretrained` loads.

        In torch.int8 or torch.int4 it is one that `coalora.load_adapted` alone reads (`coalora.export.compact`).

        Example:
            >>> bundle.adapt(budget=3.5).save_pretrained(folder / "adapter")
            >>> sorted(path.name for path in (folder / "adapter").iterdir())
            ['adapter_config.json', 'adapter_model.safetensors', 'coalora.json']
        """
        write_adapter(Path(folder), self.config, self.tensors, self.content, dtype=dtype)


class Bundle:
    """A trained, configuration-aware adapter.

    Args:
        tables: calibration of the base model.
        members: the final configuration set with its losses.
        tensors: `AdaptedModel.state_dict()` of method `coa` or `shared`.
        recipe: the adapter's sizes.
        task: the base's task.
        base_model: what the adapter's config names as its base: a hub id or an absolute path, by which `AutoPeftModel`
            loads it, or the mere name of a model that a run made or unpacked.
        num_labels: of a classifier.
        seed, dtype: that the base was loaded with: the seed decides the weights that its checkpoint lacks.
        adapter_dtype: that adapters are to be stored in.
        compensation: factors by (layer index, choice index), as `CompensationTable.factors` gives them; needed for
            every choice of a configuration that is adapted to, where the recipe has a compensation.
        statistics: what calibration returned beside the tables; without, `load` reads them when they are asked for.
        cache_bytes: limit of the layers' pairs that are kept once a configuration has asked for them; 0 keeps none. By
            default an eighth of the RAM that is available now, at most 2 GiB.

    Example:
        >>> from coalora import Bundle
        >>> model.bundle().save(folder / "saved")
        >>> Bundle.load(folder / "saved").adapt(budget=3.5).average_bits <= 3.5
        True
    """

    def __init__(
        self,
        tables: CalibrationTables,
        members: ConfigurationSet,
        tensors: dict[str, Tensor],
        recipe: AdapterRecipe,
        task: Task,
        *,
        base_model: str = "",
        num_labels: int | None = None,
        seed: int = 0,
        dtype: str = "float32",
        adapter_dtype: str = "float32",
        compensation: dict[tuple[int, int], tuple[Tensor, Tensor]] | None = None,
        statistics: Sequence[InputStatistics] | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        self.tables, self.members, self.tensors = tables, members, tensors
        self._calibrated, self._folder = statistics, cast(Path | None, None)
        self.recipe = recipe = recipe.resolved(task)
        self.task, self.base_model, self.num_labels, self.seed, self.dtype = task, base_model, num_labels, seed, dtype
        self.adapter_dtype = adapter_dtype
        self.compensation = compensation or {}
        self.ranks = recipe.ranks(tables.layers)
        self._trained = max(self.ranks) - (recipe.compensation_rank or 0)
        self._experts = expert_of_choice(tables.space, recipe.expert_bits or 0)
        limit = share_of_free_memory(torch.device("cpu")) if cache_bytes is None else cache_bytes
        # What theta, experts and compensation make of a layer's pair depends on its own choice alone.
        self._kept: ByteCache[tuple[int, int], dict[str, Tensor]] = ByteCache(limit, lambda made: nbytes(made.values()))
        self._lock = threading.Lock()  # a server's threads share a bundle
        self.theta: ConfigurationAwareModel | None = None
        theta = {k.removeprefix("theta."): v for k, v in tensors.items() if k.startswith("theta.")}
        if theta:
            self.theta = ConfigurationAwareModel(
                tables.space,
                tables.layers,
                self._trained,
                embedding_dim=recipe.embedding_dim,
                hidden_dim=recipe.hidden_dim,
                adjusted=adjusted_choices(tables.space, recipe),
            )
            self.theta.load_state_dict(theta)

    @cached_property
    def statistics(self) -> Sequence[InputStatistics] | None:
        """Calibration statistics of the target layers, with their quantized weights; None where no base needs them.

        Raises:
            CoaloraError: the bundle was written without them, or a file is not the one that was written.
        """
        if self._calibrated is not None or not self._calibrated_bases:
            return self._calibrated
        if self._folder is None or not (self._folder / STATISTICS).is_file():
            raise CoaloraError(
                f"The bundle holds no {STATISTICS}, and its bases are quantized with rounding {self.tables.rounding}",
                remedy="Save it with quantized=True (export.quantized: true), or name the run's folder where it ran",
            )
        with reading(self._folder):
            _check(self._folder, CALIBRATION)
            return load_statistics(self._folder, self.tables.layers, self.tables.space)

    @property
    def digest(self) -> str:
        """Digest of the files that it was read from.

        Raises:
            CoaloraError: it was not read from files.
        """
        if self._folder is None:
            raise CoaloraError("The bundle has no digest: it is in memory alone", remedy="Save it and load it again")
        return file_sha256(self._folder / HEADER)

    @property
    def carries_statistics(self) -> bool:
        """Whether `statistics` can be had."""
        here = self._folder is not None and (self._folder / STATISTICS).is_file()
        return self._calibrated is not None or not self._calibrated_bases or here

    @property
    def _calibrated_bases(self) -> bool:
        """Whether weights are quantized with more than their own values."""
        return self.tables.rounding != "absmax" or self.tables.space.needs_statistics

    def select(self, budget: float | str) -> np.ndarray:
        """The configuration (N,) for a budget, in the unit of the tables' cost (by default average bits), or with its
        unit (`coalora.calibrate.costs.parse_budget`).

        Raises:
            CoaloraError: the budget is outside of what configurations can reach.
        """
        budget = parse_budget(budget, self.tables.cost_kind)
        low, high = self.tables.cost_range()
        if not low <= budget <= high * 1.001:  # the end as it is shown is within
            unit = self.tables.cost_unit
            side = "above" if budget > high else "below"
            raise CoaloraError(
                f"A budget of {budget} {unit.unit} is {side} the choice space, which spans {low:.3f} to {high:.3f} "
                f"{unit.words}",
                remedy="Ask for one within, or train with a space that has other choices",
            )
        members, tables = self.members, self.tables
        known = tables.of_groups(members.configurations)
        given, allowed = (tables.search_cost, tables.search_err, budget), tables.search_allowed
        if self.recipe.compensation_rank:  # where no member fits, choices that the set has
            own = np.zeros_like(tables.allowed)
            own[tuple(np.array(list(self.compensation), dtype=np.int64).reshape(-1, 2).T)] = True
            allowed = replace(tables, allowed=tables.allowed & own).search_allowed
        return tables.expand(best_within(known, members.losses, *given, allowed=allowed))

    def counting(
        self, kind: CostKind, *, table: Path | str | None = None, adapter_dtype: torch.dtype = torch.float32
    ) -> Bundle:
        """The same bundle with budgets in another unit: bits, all bytes of a device, or microseconds.

        Args:
            table: of latencies; needed for `latency`, unless the bundle was trained for it.
            adapter_dtype: that adapters are stored in; counts in `file_bytes`.

        Raises:
            CoaloraError: a latency without a table, or a table that lacks a layer or choice.
        """
        tables = self.tables
        if kind == "file_bytes":
            tables = tables.of_files(adapter_nbytes(tables.layers, self.ranks, tables.head_size, adapter_dtype))
        elif table is not None:
            latency = read_latency(Path(table), tables.layers, tables.space, tables.allowed)
            tables = replace(tables, cost_kind=kind, latency=latency)
        elif kind != tables.cost_kind:
            if kind == "latency":
                raise CoaloraError(
                    "Nothing says how long a choice takes on the device", remedy="Give its latency table with --table"
                )
            tables = replace(tables, cost_kind=kind, latency=None)
        other = copy(self)
        other.tables = tables
        return other

    def loss_of(self, configuration: np.ndarray) -> float | None:
        """Loss of a configuration (N,) on the search split, as it was measured last; None for one that never was."""
        at = np.flatnonzero((self.members.configurations == configuration).all(1))
        return float(self.members.losses[at[0]]) if at.size and np.isfinite(self.members.losses[at[0]]) else None

    def problems(self) -> Iterator[str]:
        """Tensors of pairs and experts that are missing, or of another shape than their layers ask for."""
        experts = range(max(self._experts) + 1 if any(name.startswith("experts.") for name in self.tensors) else 0)
        for index, (layer, rank) in enumerate(zip(self.tables.layers, self.ranks, strict=True)):
            rank -= self.recipe.compensation_rank or 0
            n_out, n_in = layer.shape
            for side, shape in (("A", (rank, n_in)), ("B", (n_out, rank))):
                own = [f"experts.lora_{side}.{index}_{expert}" for expert in experts]
                for name in [f"lora.{layer.name}.lora_{side}.weight", *own]:
                    tensor = self.tensors.get(name)
                    if tensor is None or tuple(tensor.shape) != shape:
                        found = "missing" if tensor is None else tuple(tensor.shape)
                        yield f"{name} is {found}, and its layer needs {shape}"

    @torch.no_grad()
    def adapt_to(self, configuration: np.ndarray) -> Adapted:
        """The adapter of one configuration (N,): theta's U folded into lora_A.

        A layer's pair is made when a configuration first asks for its choice, and kept within `cache_bytes`.
        """
        content = configuration_dict(configuration, self.tables)
        own = ("theta.", "experts.")
        tensors = {peft_key(k.split(".", 1)[1]): v for k, v in self.tensors.items() if not k.startswith(own)}
        asked = [(index, int(k)) for index, k in enumerate(configuration)]
        with self._lock:
            kept = {pair: made for pair in asked if (made := self._kept.get(pair)) is not None}
        if missing := [pair for pair in asked if pair not in kept]:
            U = self._adjustments(configuration)
            kept |= {(index, k): self._make(index, k, U[index]) for index, k in missing}
            with self._lock:
                for pair in missing:
                    self._kept.put(pair, kept[pair])
        for pair in asked:
            tensors |= kept[pair]
        average_bits = float(self.tables.average_bits(configuration))
        content |= {"average_bits": round(average_bits, 6), "digest": configuration_digest(content)}
        heads = sorted({k.removeprefix("head.").rpartition(".")[0] for k in self.tensors if k.startswith("head.")})
        config = lora_config(self.tables.layers, self.task, ranks=self.ranks, scale=self.recipe.scale, heads=heads)
        config.base_model_name_or_path = self.base_model
        return Adapted(average_bits, np.asarray(configuration), content, config, tensors)

    @torch.no_grad()
    def prepare(self) -> None:
        """Make the pairs of all layers and choices now, those of the set's choices first, as far as `cache_bytes` go:
        every budget is answered from them, in the time that its configuration takes to choose.

        Example:
            >>> bundle.prepare()
            >>> bundle.adapt(budget=3.5).average_bits <= 3.5
            True
        """
        space, allowed = self.tables.space, self.tables.allowed
        used = np.bincount(self.members.configurations.ravel(), minlength=len(space))
        for k in map(int, np.argsort(-used, kind="stable")):
            U = self._adjustments(np.full(len(allowed), k))
            for index in map(int, np.flatnonzero(allowed[:, k])):
                if self.recipe.compensation_rank and (index, k) not in self.compensation:
                    continue
                made = self._make(index, k, U[index])
                with self._lock:
                    if self._kept.nbytes + nbytes(made.values()) > self._kept.limit:
                        return
                    self._kept.put((index, k), made)

    def _adjustments(self, configuration: np.ndarray) -> Sequence[Tensor | None]:
        """U (r, r) of every layer; None where it is zero."""
        chosen = torch.as_tensor(configuration)
        U = None if self.theta is None else self.theta(chosen)
        if (used := used_ranks(self.tables.space, self.recipe, self._trained)) is not None:
            U = cascaded(U, used[chosen])
        if U is None:
            return [None] * len(configuration)
        moved = U.flatten(1).any(1).tolist()  # theta adjusts some choices alone
        return [own if moves else None for own, moves in zip(U, moved, strict=True)]

    def _make(self, index: int, k: int, U: Tensor | None) -> dict[str, Tensor]:
        """What choice k makes of a layer's pair, under PEFT's names: factors that stay as trained are left out."""
        name = self.tables.layers[index].name
        trained = [self.tensors[f"lora.{name}.lora_{side}.weight"] for side in "AB"]
        A, B = trained
        expert = self._experts[k]
        if expert != NO_EXPERT:
            A = A + self.tensors[f"experts.lora_A.{index}_{expert}"]
            B = B + self.tensors[f"experts.lora_B.{index}_{expert}"]
        A = fold(A, U)
        if self.recipe.compensation_rank:
            below, beside = self._compensation(index, k)
            A, B = torch.cat([A, below]), torch.cat([B, beside / self.recipe.scale], dim=1)
        sides = zip("AB", (A, B), trained, strict=True)
        return {peft_key(f"{name}.lora_{side}.weight"): made for side, made, own in sides if made is not own}

    def _compensation(self, index: int, choice: int) -> tuple[Tensor, Tensor]:
        if (index, choice) not in self.compensation:
            space = self.tables.space
            known = ", ".join(space.describe(k) for layer, k in sorted(self.compensation) if layer == index)
            raise CoaloraError(
                f"The bundle has no compensation of {space.describe(choice)} for {self.tables.layers[index].name}, "
                f"whose choices in the set are {known or 'none'}",
                remedy="Take one of these, or train with compensation_rank=0",
            )
        return self.compensation[index, choice]

    def adapt(self, budget: float | str) -> Adapted:
        """Configuration and adapter for any budget, as `select` takes it.

        Raises:
            CoaloraError: the budget is outside of what configurations can reach.

        Example:
            >>> adapted = bundle.adapt(budget=3.5)
            >>> adapted.average_bits <= 3.5
            True
        """
        return self.adapt_to(self.select(budget))

    def write(self, adapted: Adapted, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Write `configuration.json` and a PEFT adapter under `adapter/` into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIGURATION, adapted.content)
        adapted.save_pretrained(folder / "adapter", dtype=dtype)

    def save(self, folder: Path | str, *, quantized: bool = True) -> None:
        """Write the bundle's files into `folder`.

        Args:
            quantized: write statistics and quantized weights as well, where bases depend on them: all choices together
                take about as much room as the model in 16 bits. Without them the bundle makes adapters alone.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.tables.save(folder / "tables.safetensors")
        write_json(folder / "configurations.json", self.members.to_dict(self.tables))
        stored = {
            f"{_COMPENSATION}{index}.{k}.lora_{side}": factor.half()  # exact: the factors are float16 values
            for (index, k), pair in self.compensation.items()
            for side, factor in zip("AB", pair, strict=True)
        }
        write_tensors(folder / "adapter.safetensors", self.tensors | stored)
        if quantized and self.statistics is not None:
            # A Hessian only decides what is quantized already.
            every = self.tables.allowed.sum(1)
            known = [
                replace(seen, hessian=None) if len(seen.packed) == n else seen
                for seen, n in zip(self.statistics, every, strict=True)
            ]
            save_statistics(folder, self.tables.layers, known, self.tables.space)
        names = [name for name in (*FILES, *CALIBRATION) if (folder / name).exists()]
        about = {name: getattr(self, name) for name in _ABOUT}
        header = {"format": _FORMAT, "recipe": self.recipe.to_dict(), **about}
        write_json(folder / HEADER, header | {"files": file_digests(folder, names)})

    @classmethod
    def load(cls, folder: Path | str, *, cache_bytes: int | None = None) -> Bundle:
        """Read what `save` wrote.

        Args:
            cache_bytes: as of the class.

        Raises:
            CoaloraError: a file is missing, damaged, not the one that was written or of another format, or the set
                belongs to other tables.
        """
        folder = Path(folder)
        for name in (HEADER, *FILES):
            if not (folder / name).is_file():
                raise CoaloraError(f"There is no {name} in {folder}", remedy="Name the folder of a bundle")
        with reading(folder):
            header = _check(folder, FILES)
            tables = CalibrationTables.load(folder / "tables.safetensors")
            members = ConfigurationSet.from_dict(read_json(folder / "configurations.json"), tables)
            if not len(members):
                raise CoaloraError(
                    f"configurations.json of {folder} has no members", remedy="Make or download the bundle again"
                )
            tensors, _ = read_tensors(folder / "adapter.safetensors")
            stored = {key: tensors.pop(key).float() for key in list(tensors) if key.startswith(_COMPENSATION)}
            pairs = sorted({tuple(map(int, key.split(".")[1:3])) for key in stored})
            bundle = cls(
                tables,
                members,
                tensors,
                AdapterRecipe.from_dict(header["recipe"]),
                **{name: header[name] for name in _ABOUT},
                compensation={
                    (i, k): (stored[f"{_COMPENSATION}{i}.{k}.lora_A"], stored[f"{_COMPENSATION}{i}.{k}.lora_B"])
                    for i, k in pairs
                },
                cache_bytes=cache_bytes,
            )
            bundle._folder = folder
            for problem in bundle.problems():
                raise CoaloraError(f"adapter.safetensors: {problem}", remedy="Make or download the bundle again")
            return bundle


def _check(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """The header of a bundle, whose files `names` are those that were written (of `CALIBRATION`, those there are)."""
    header = read_json(folder / HEADER)
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        form = str(header.get("format") if isinstance(header, dict) else header)[:100]
        raise CoaloraError(
            f"{HEADER} of {folder} is of the format {form}, not that of a bundle ({_FORMAT})",
            remedy="Write the bundle again with this version",
        )
    digests = header.get("files")
    if not isinstance(digests, dict) or not set(FILES) <= digests.keys() <= {*FILES, *CALIBRATION}:
        raise CoaloraError(
            f"{HEADER} of {folder} carries no sha256 of a bundle's files", remedy="Make or download the bundle again"
        )
    wanted = [name for name in names if name in digests]
    check_files(folder, {name: digests[name] for name in wanted}, wanted)
    return header
