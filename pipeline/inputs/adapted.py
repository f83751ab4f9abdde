"""The adapted model behind artifacts: parameters of a training state, put into base, adapter and theta."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from coalora.adapt.adapted import AdaptedModel
from coalora.data.benchmark import Benchmark
from coalora.files import read_tensors
from coalora.recipes import AdapterRecipe
from coalora.train.loop import ASIDE, TrainingState
from pipeline.inputs.loaders import BaseModel, load_input_statistics, load_tables
from pipeline.settings.sections import RuntimeSettings
from pipeline.store.store import Artifact, Store

STATE = "state.safetensors"
HISTORY = "history.json"


def load_state(artifact: Artifact) -> TrainingState:
    tensors, header = read_tensors(Store().path(artifact) / STATE)
    return TrainingState(header["step"], tensors)


def parameters(artifact: Artifact) -> dict[str, Tensor]:
    """The trained parameters of a state, without the optimizer's moments."""
    return {k: v for k, v in load_state(artifact).tensors.items() if not k.startswith(ASIDE)}


def build_adapted(
    source: BaseModel,
    data: Benchmark,
    tables: Artifact,
    *,
    method: str,
    adapter: AdapterRecipe,
    runtime: RuntimeSettings,
    seed: int,
    state: Artifact | None = None,
) -> AdaptedModel:
    """Base, adapter and theta, with the parameters of `state` where one is given."""
    measured = load_tables(tables)
    packed = runtime.weights == "packed"
    # Packed layers need not fit the device in full precision: the model is loaded beside it and moved without them.
    model = source.load(data, replace(runtime, device="cpu") if packed else runtime, seed=seed)
    adapted = AdaptedModel(
        model,
        measured.layers,
        measured.space,
        data.task,
        method=method,
        recipe=adapter.resolved(data.task),
        seed=seed,
        statistics=load_input_statistics(tables, measured),
        start=state is None,
        cache_bytes=runtime.cache_mib << 20,
        master=runtime.master,
        weights=runtime.weights,
        checkpoint=source.path if runtime.master == "mmap" else None,
        device=torch.device(runtime.device) if packed else None,
    )
    if state is not None:
        adapted.load_state_dict(parameters(state))
    return adapted
