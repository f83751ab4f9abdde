"""Adapted model behind artifacts: what decides it, and one that stays loaded between the stages of a process.

Loading, quantizing and compensating a model takes longer than many stages do with it. Each thread therefore keeps the
model that it used last, and its next stage finds it there, with other trained parameters put in where the state is
another one; another base, method or recipe drops it before the next model is built. A start without a state is always
built anew. So `evaluation.workers` threads hold as many models at the same time; processes hold their own.

Results do not depend on it: every random number is drawn under a seed that its stage sets, and a model that is switched
to a configuration computes the same whatever it held before.

Loading a model changes what all threads share (torch's default number type and random generator, transformers' way to
initialise), so that a model is loaded while nothing is measured: with several workers a load waits for the shards that
are under way.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from coalora.adapt.adapted import AdaptedModel
from coalora.calibrate.tables import CalibrationTables
from coalora.data.benchmark import Benchmark
from coalora.evaluate.reference import Reference
from coalora.files import digest, read_tensors
from coalora.recipes import AdapterRecipe, Goal
from coalora.train.loop import ASIDE, TrainingState
from pipeline.inputs.loaders import BaseModel, load_benchmark, load_input_statistics, load_tables
from pipeline.settings.sections import RuntimeSettings
from pipeline.store.store import Artifact, current_store

STATE = "state.safetensors"
HISTORY = "history.json"
M = TypeVar("M")  # an adapted model, or a base in full precision


def load_state(artifact: Artifact) -> TrainingState:
    tensors, header = read_tensors(current_store().path(artifact) / STATE)
    return TrainingState(header["step"], tensors)


def parameters(artifact: Artifact) -> dict[str, Tensor]:
    """The trained parameters of a state, without the optimizer's moments."""
    return {k: v for k, v in load_state(artifact).tensors.items() if not k.startswith(ASIDE)}


def reference_of(model: "ModelInputs", ceiling: Artifact | None) -> Reference:
    """What KL divergence and agreement are measured against: the base, or with the adapter of stage `ceiling`."""
    if ceiling is None:
        return Reference()
    own = {k: v.to(model.runtime.device) for k, v in parameters(ceiling).items()}
    sides = [[own[f"lora.{layer.name}.lora_{side}.weight"] for side in "AB"] for layer in model.measured.layers]
    return Reference([(A, B) for A, B in sides], model.adapter.scale)


def searched_against(goal: Goal) -> Reference | None:
    """The base, whose KL divergence the search minimises to recover; None: it minimises the task's loss."""
    return Reference() if goal == "recover" else None


@dataclass(frozen=True)
class ModelInputs:
    """Inputs that decide an adapted model, but for its method and its trained state; one argument of a stage."""

    base: Artifact
    benchmark: Artifact
    tables: Artifact
    adapter: AdapterRecipe
    runtime: RuntimeSettings
    seed: int

    def __getstate__(self) -> dict[str, Any]:
        """Without what was loaded: other processes load their own."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def source(self) -> BaseModel:
        return BaseModel(self.base)

    @cached_property
    def data(self) -> Benchmark:
        return load_benchmark(self.benchmark)

    @cached_property
    def measured(self) -> CalibrationTables:
        return load_tables(self.tables)

    @contextmanager
    def adapted(self, method: str, state: Artifact) -> Iterator[AdaptedModel]:
        """The model with the parameters of `state`, for this thread alone. Which configuration it holds is left from
        what was measured before: switch first.
        """

        def put(model: AdaptedModel) -> None:
            model.load_state_dict(parameters(state))

        with hold(self._key(method), lambda: self.build(method, start=False), state.digest, put) as model:
            yield model

    @contextmanager
    def trainable(self, method: str, *, fresh: bool) -> Iterator[AdaptedModel]:
        """The model for training, for this thread alone: at its start, or else to be given a state's parameters."""
        key = self._key(method)
        if fresh:
            _held.pop(threading.current_thread(), None)
        with hold(key, lambda: self.build(method, start=fresh), None) as model:
            yield model

    def build(self, method: str, *, start: bool = True) -> AdaptedModel:
        """Base, adapter and theta, loaded anew.

        Args:
            start: whether experts are set to their start; not needed where a state is put in.
        """
        packed = self.runtime.weights == "packed"
        # Packed layers need not fit the device in full precision: the model is loaded beside it and moved without them.
        beside = replace(self.runtime, device="cpu") if packed else self.runtime
        return AdaptedModel(
            self.source.load(self.data, beside, seed=self.seed),
            self.measured.layers,
            self.measured.space,
            self.data.task,
            method=method,
            recipe=self.adapter.resolved(self.data.task),
            seed=self.seed,
            statistics=load_input_statistics(self.tables, self.measured),
            start=start,
            cache_bytes=self.runtime.cache_bytes,
            master=self.runtime.master,
            weights=self.runtime.weights,
            checkpoint=self.source.path if self.runtime.master == "mmap" else None,
            device=torch.device(self.runtime.device) if packed else None,
        )

    def _key(self, method: str) -> str:
        artifacts = [a.digest for a in (self.base, self.benchmark, self.tables)]
        settings = [self.adapter.to_dict(), self.runtime.to_dict()]
        return digest([artifacts, settings, method, self.seed])


class LoadGuard:
    """Lock of which many may measure at a time, or one may load. A load that waits goes before later measurements."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._measuring = 0
        self._waiting = 0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting)
            self._measuring += 1
        try:
            yield
        finally:
            with self._changed:
                self._measuring -= 1
                self._changed.notify_all()

    @contextmanager
    def loading(self) -> Iterator[None]:
        with self._changed:  # held throughout: nothing can begin meanwhile
            self._waiting += 1
            try:
                self._changed.wait_for(lambda: not self._measuring)
                yield
            finally:
                self._waiting -= 1
                self._changed.notify_all()


@dataclass
class Held:
    """A loaded model, and the digest of the state whose parameters it has; None where nobody knows."""

    key: str
    model: Any
    state: str | None = None


_guard = LoadGuard()
# By thread, and not by its number, which a new thread takes over from one that is gone.
_held: dict[threading.Thread, Held] = {}


@contextmanager
def hold(
    key: str, build: Callable[[], M], state: str | None = None, put: Callable[[M], None] = lambda model: None
) -> Iterator[M]:
    """The model `key` of this thread with the parameters of `state`; what raises while it is used drops it.

    Args:
        build: makes the model where this thread holds another, or none.
        state: digest of its parameters; None where the caller replaces them.
        put: puts them into the model.
    """
    thread = threading.current_thread()
    held = _held.get(thread)
    if held is None or held.key != key:
        del held  # first, or there would be two for a while
        with _guard.loading():
            _drop_others(key)
            held = _held[thread] = Held(key, build())
    try:
        with _guard.measuring():
            if state is None or held.state != state:
                held.state = None
                put(held.model)
                held.state = state
            yield held.model
    except BaseException:
        _held.pop(thread, None)
        raise


def _drop_others(key: str) -> None:
    """Drop models of other keys, of which none is in use while one is loaded, and those of threads that are gone."""
    for thread, held in list(_held.items()):
        if held.key != key or not thread.is_alive():
            del _held[thread]


def release_models() -> None:
    """Forget the models of all threads of this process."""
    _held.clear()
