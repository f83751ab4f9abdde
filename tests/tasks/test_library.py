"""The library alone and the pipeline's stages compute the same run, bit for bit."""

from __future__ import annotations

import numpy as np
import torch

from coalora.config import CoaLoraConfig
from coalora.export.bundle import Bundle
from coalora.model import CoaLoraModel
from pipeline.inputs.adapted import parameters
from pipeline.inputs.loaders import BaseModel, load_benchmark, load_tables
from pipeline.store.store import default_store
from tests.tiny_run import TinyRun


def test_fit_is_the_pipelines_training_and_search_bit_for_bit(run: TinyRun) -> None:
    s, data = run.settings, load_benchmark(run.calibrated.benchmark)
    tables = load_tables(run.calibrated.tables)
    config = CoaLoraConfig(
        **vars(s.adapter),
        choices=tables.space,
        calibration=s.calibration,
        training=s.training,
        initial_set=s.initial_set,
        search=s.search,
        seed=s.seed,
        device="cpu",
        dtype="float32",
    )
    model = CoaLoraModel.from_pretrained(BaseModel(run.calibrated.base).path, config)
    found = model.calibrate(data.train)
    assert (found.layers, found.base_digest) == (tables.layers, tables.base_digest)
    np.testing.assert_array_equal(found.err, tables.err)
    model.fit(data.train, data.search, budgets=s.evaluation.budgets)
    state = parameters(run.trained.states["coa"][-1])
    assert model.adapted.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.adapted.state_dict().items())
    theirs = Bundle.load(default_store().path(run.exported.bundle))
    np.testing.assert_array_equal(model.members.configurations, theirs.members.configurations)
    np.testing.assert_array_equal(model.members.losses, theirs.members.losses)
    for budget in s.evaluation.budgets:
        own, other = model.bundle().adapt(budget), theirs.adapt(budget)
        assert own.content == other.content
        assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in own.tensors.items())
