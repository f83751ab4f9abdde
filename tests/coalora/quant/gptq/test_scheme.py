"""The gptq scheme: gptqmodel's own output from a Hessian collected before, stored exactly."""

from __future__ import annotations

import importlib.util
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from coalora.calibrate.statistics import collect_statistics
from coalora.calibrate.tables import calibration_tables, error_table
from coalora.errors import CoaloraError
from coalora.export.base import load_base, write_base
from coalora.models.switching.quantized import QuantizedBase
from coalora.models.targets import find_target_layers
from coalora.quant.gptq import solver as gptq_solver
from coalora.quant.gptq.scheme import GPTQChoice, GPTQScheme
from coalora.quant.nf.scheme import NFChoice
from coalora.quant.registry import get_scheme
from coalora.quant.scheme import InputStatistics
from coalora.quant.space import ChoiceSpace

GPTQ = GPTQScheme()
SOME = (GPTQChoice(2, 32), GPTQChoice(3, 64, 0), GPTQChoice(4, 128), GPTQChoice(8, 32, 0))
CHOICES = pytest.mark.parametrize("choice", SOME, ids=str)
HAVE_GPTQMODEL = importlib.util.find_spec("gptqmodel") is not None
needs_gptqmodel = pytest.mark.skipif(not HAVE_GPTQMODEL, reason="gptqmodel (extra `gptq`) is not installed")


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs(n: int, seed: int = 0) -> Tensor:
    """Correlated inputs (1024, n) of few digits, so that sums of their products are exact in any order."""
    mixed = gaussian(1024, n, seed=seed) @ (gaussian(n, n, seed=seed + 1) / n**0.5 + torch.eye(n) * 0.3)
    return (mixed * 4).round().clamp_(-32, 32) / 8


def known(x: Tensor) -> InputStatistics:
    return InputStatistics(x.square().mean(0), x.T @ x / len(x))


def output_error(W: Tensor, quantized: Tensor, H: Tensor) -> float:
    E, H, W = (W - quantized).double(), H.double(), W.double()
    return float(((E @ H) * E).sum() / ((W @ H) * W).sum())


def handmade_state(choice: GPTQChoice, rows: int, columns: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    groups = -(-columns // choice.group_size)
    state = {
        "codes": torch.randint(0, 2**choice.bits, (rows * columns,), generator=generator, dtype=torch.uint8),
        "scales": torch.rand(rows * groups, generator=generator).to(torch.float16),
    }
    if not choice.sym:
        state["zeros"] = torch.randint(0, 2**choice.bits, (rows * groups,), generator=generator, dtype=torch.uint8)
    return state


def test_the_scheme_is_found_by_name_with_all_its_choices() -> None:
    assert isinstance(get_scheme("gptq"), GPTQScheme)
    assert len(ChoiceSpace("gptq")) == 24
    assert len(ChoiceSpace("gptq", sym=[1])) == 12
    assert [str(c) for c in ChoiceSpace("gptq", bits=[3], group_size=[64]).choices] == ["gptq3 g64", "gptq3 g64 zp"]
    with pytest.raises(CoaloraError, match="GPTQChoice has no bits 5"):
        GPTQChoice(5, 64)
    with pytest.raises(CoaloraError, match="is no GPTQChoice"):
        GPTQ.nominal_bits(NFChoice(4, 8, "fp32", 64, 256))


@CHOICES
@pytest.mark.parametrize("shape", [(8, 128), (5, 52), (3, 200)])
def test_packing_is_reversed_by_unpacking_and_takes_the_bytes_that_are_counted(choice, shape) -> None:
    state = handmade_state(choice, *shape)
    packed = GPTQ.pack(state, choice, shape)
    assert sum(tensor.nbytes for tensor in packed.values()) == GPTQ.packed_nbytes(choice, shape)
    back = GPTQ.unpack(packed, choice, shape)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


@CHOICES
def test_counted_bytes_are_the_nominal_bits_where_groups_divide_rows(choice) -> None:
    assert GPTQ.packed_nbytes(choice, (64, 256)) * 8 == GPTQ.nominal_bits(choice) * 64 * 256


@CHOICES
def test_dequantizing_is_scale_times_code_minus_zero(choice) -> None:
    """Written out one weight at a time; the last group of a row is short."""
    rows, columns = 3, 200
    state = handmade_state(choice, rows, columns)
    weight = GPTQ.dequantize(state, choice, (rows, columns))
    groups = math.ceil(columns / choice.group_size)
    for i, j in ((0, 0), (1, 31), (1, 32), (2, 127), (2, 128), (0, 199)):
        group = i * groups + j // choice.group_size
        zero = 2 ** (choice.bits - 1) if choice.sym else int(state["zeros"][group])
        assert weight[i, j] == (int(state["codes"][i * columns + j]) - zero) * state["scales"][group].float()
    assert GPTQ.dequantize(state, choice, (rows, columns), torch.bfloat16).dtype == torch.bfloat16


def test_states_and_tensors_of_another_choice_are_refused() -> None:
    state = handmade_state(SOME[0], 4, 64)
    with pytest.raises(CoaloraError, match="This state is not that of"):
        GPTQ.dequantize(state, SOME[1], (4, 64))
    packed = GPTQ.pack(state, SOME[0], (4, 64))
    with pytest.raises(CoaloraError, match=r"packed weight is not .* under gptq8"):
        GPTQ.unpack(packed, SOME[3], (4, 64))


class Test_without_gptqmodel:
    @pytest.fixture(autouse=True)
    def _absent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gptq_solver, "find_spec", lambda name: None)

    def test_quantizing_and_the_early_check_name_the_extra(self) -> None:
        statistics = InputStatistics(torch.ones(32), torch.eye(32))
        for call in (GPTQ.require_packages, lambda: GPTQ.quantize(torch.ones(2, 32), SOME[0], statistics)):
            with pytest.raises(CoaloraError, match=r"pip install 'coalora\[gptq\]'"):
                call()

    def test_a_packed_weight_still_unpacks(self) -> None:
        state = handmade_state(SOME[0], 4, 64)
        unpacked = GPTQ.unpack(GPTQ.pack(state, SOME[0], (4, 64)), SOME[0], (4, 64))
        assert GPTQ.dequantize(unpacked, SOME[0], (4, 64)).shape == (4, 64)


@pytest.mark.parametrize(("found", "fine"), [("7.4.0", True), ("7.6.2.post1", True), ("7.3.9", False), ("7.7", False)])
def test_only_versions_whose_inside_is_known_are_accepted(monkeypatch: pytest.MonkeyPatch, found, fine) -> None:
    monkeypatch.setattr(gptq_solver, "find_spec", lambda name: object())
    monkeypatch.setattr(gptq_solver, "version", lambda name: found)
    if fine:
        gptq_solver.check_installed()
    else:
        with pytest.raises(CoaloraError, match=r"gptqmodel >=7\.4,<7\.7 and found"):
            gptq_solver.check_installed()


def test_statistics_without_a_hessian_are_refused() -> None:
    for statistics in (None, InputStatistics(torch.ones(32))):
        with pytest.raises(CoaloraError, match=r"collect_statistics\(hessians=True\)"):
            GPTQ.quantize(torch.ones(2, 32), SOME[0], statistics)


def _fresh(program: str) -> str:
    root = Path(__file__).parents[4]
    path = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment.pop("HF_HOME", None)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_looking_schemes_up_does_not_import_gptqmodel() -> None:
    program = (
        "import sys; from coalora.quant.registry import get_scheme; get_scheme('nf'); get_scheme('gptq');"
        "print('gptqmodel' in sys.modules)"
    )
    assert _fresh(program) == "False\n"


@needs_gptqmodel
def test_importing_gptqmodel_prints_no_text_and_leaves_the_process_as_it_was() -> None:
    program = (
        "import logging, os, safetensors.torch as s; from coalora.quant.gptq import solver as gptq_solver;"
        "before = dict(os.environ), s.save_file, list(logging.getLogger().handlers);"
        "gptq_solver._gptqmodel();"
        "assert os.environ.pop('GPTQMODEL_CPU_WORKERS') and s.save_file is before[1];"
        "assert logging.getLogger().handlers == before[2];"
        "before[0].pop('GPTQMODEL_CPU_WORKERS', None); assert dict(os.environ) == before[0]; print('same')"
    )
    assert _fresh(program).split() == ["same"]  # an empty line gets out


@pytest.fixture
def own() -> tuple[type, type]:
    """gptqmodel's classes."""
    return gptq_solver._gptqmodel()


def own_output(own: tuple[type, type], W: Tensor, batches: Iterator[Tensor], choice: GPTQChoice) -> tuple[Tensor, ...]:
    """As gptqmodel's own processor does it: a forward hook that adds every batch, then `quantize`."""
    layer = nn.Linear(W.shape[1], W.shape[0], bias=False)
    layer.weight.data = W.clone()
    settings = {"bits": choice.bits, "group_size": choice.group_size, "sym": bool(choice.sym)}
    task = own[0](layer, own[1](**settings, mse=2.0 if choice.bits < 8 else 0.0))
    task.quantizer.configure(perchannel=True)
    handle = layer.register_forward_hook(lambda module, x, y: task.add_batch(x[0].data, y.data))
    with torch.no_grad():
        for batch in batches:
            layer(batch)
    handle.remove()
    return task.quantize()[:3]


@needs_gptqmodel
@CHOICES
@pytest.mark.parametrize("shape", [(48, 128), (20, 200)])
def test_codes_and_scales_are_those_of_gptqmodel_fed_with_the_batches(own, choice, shape) -> None:
    """Equal, not close: these inputs give both the same Hessian bit for bit. 200 features leave a short last group."""
    W, x = gaussian(*shape), inputs(shape[1])
    quantized, scales, zeros = own_output(own, W, iter(x.view(4, 256, -1)), choice)
    state = GPTQ.quantize(W, choice, known(x))
    assert torch.equal(state["scales"].view(shape[0], -1), scales.half())
    if not choice.sym:
        assert torch.equal(state["zeros"].view(shape[0], -1), zeros.to(torch.uint8))
    of_column = torch.arange(shape[1]) // choice.group_size
    codes = state["codes"].view(shape).float() - (2 ** (choice.bits - 1) if choice.sym else zeros[:, of_column])
    torch.testing.assert_close(codes * scales[:, of_column], quantized, rtol=0, atol=0)
    # What is stored has scales in fp16, and nothing else differs.
    torch.testing.assert_close(GPTQ.dequantize(state, choice, shape), quantized, rtol=2**-11, atol=1e-7)


@needs_gptqmodel
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_a_models_collected_hessians_give_what_its_batches_give(own, tiny_models, class_split, family) -> None:
    """Sums in another order: a few codes may fall on the other side of a tie, the error is the same."""
    model = tiny_models[family]()
    layer = find_target_layers(model)[-1]
    statistics = collect_statistics(model, [layer], class_split, batch_size=4, hessians=True)[0]
    seen: list[Tensor] = []
    handle = model.get_submodule(layer.name).register_forward_pre_hook(lambda m, x: seen.append(x[0].flatten(0, -2)))
    with torch.no_grad():
        for ids, n in zip(class_split.input_ids, class_split.lengths, strict=True):
            model(input_ids=ids[None, :n])
    handle.remove()
    W = layer.matrix(model.get_submodule(layer.name).weight.data).contiguous()
    choice = GPTQChoice(4, 32)
    expected, *_ = own_output(own, W, iter(seen), choice)
    result = GPTQ.fake_quantize(W, choice, statistics)
    assert ((result - expected).abs() <= 2**-10 * expected.abs() + 1e-6).float().mean() > 0.97
    H = statistics.hessian
    assert output_error(W, result, H) == pytest.approx(output_error(W, expected, H), rel=0.02)


@needs_gptqmodel
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_it_beats_rounding_on_the_same_grid_in_the_error_that_it_minimises(own, bits) -> None:
    W, x = gaussian(64, 128), inputs(128)
    choice = GPTQChoice(bits, 64)
    statistics = known(x)
    H = statistics.hessian
    plain = InputStatistics(statistics.second_moment, torch.eye(128))  # nothing to make up for: plain rounding
    err = output_error(W, GPTQ.fake_quantize(W, choice, statistics), H)
    rounded = output_error(W, GPTQ.fake_quantize(W, choice, plain), H)
    assert err < 0.8 * rounded
    assert error_table([W], [statistics], ChoiceSpace("gptq", bits=[bits], group_size=[64], sym=[1])) == pytest.approx(
        err, rel=1e-3
    )


@needs_gptqmodel
def test_a_diagonal_hessian_leaves_plain_rounding_to_the_nearest_code() -> None:
    W, choice = gaussian(16, 64), GPTQChoice(8, 32)
    state = GPTQ.quantize(W, choice, InputStatistics(torch.ones(64), torch.eye(64)))
    scales = W.view(16, 2, 32).abs().amax(2) * 2 / 255
    assert torch.equal(state["scales"].view(16, 2), scales.half())
    codes = (W.view(16, 2, 32) / scales[..., None]).round().clamp(-128, 127) + 128
    assert torch.equal(state["codes"], codes.to(torch.uint8).view(-1))


@needs_gptqmodel
def test_many_choices_together_give_what_each_gives_alone_again_and_again() -> None:
    """The factor that they share belongs to the Hessian and the group size, and nothing random enters."""
    W, statistics = gaussian(24, 96), known(inputs(96))
    before = W.clone(), statistics.hessian.clone()
    together = [state for (state,) in GPTQ.quantize_layers([W], SOME, [statistics])]
    for choice, state in zip(SOME, together, strict=True):
        alone = GPTQ.quantize(W, choice, statistics)
        assert all(torch.equal(alone[name], tensor) and not tensor.is_inference() for name, tensor in state.items())
    assert torch.equal(W, before[0])
    assert torch.equal(statistics.hessian, before[1])


@needs_gptqmodel
def test_features_that_never_fire_and_too_few_samples_are_no_obstacle() -> None:
    W, x = gaussian(8, 64), inputs(64)[:5].clone()
    x[:, 7] = 0
    result = GPTQ.fake_quantize(W, GPTQChoice(4, 32), known(x))
    assert torch.isfinite(result).all()
    assert (result[:, 7] == 0).all()  # gptqmodel gives up weights that nothing feeds


@needs_gptqmodel
def test_bad_weights_and_hessians_are_refused() -> None:
    good = InputStatistics(torch.ones(32), torch.eye(32))
    indefinite = torch.full((32, 32), 1e6).fill_diagonal_(1)
    for weight, statistics, message in (
        (torch.ones(4, 64), good, "is not one of 64 input features"),
        (torch.full((4, 32), float("nan")), good, "weight of a layer to quantize has entries that are NaN"),
        (
            torch.ones(4, 32),
            InputStatistics(torch.ones(32), torch.eye(32) / 0),
            "Hessian of a layer to quantize has entries",
        ),
        (torch.ones(4, 32, dtype=torch.int64), good, "floating-point matrix"),
        (torch.ones(4, 32), InputStatistics(torch.ones(32), indefinite), "No damping makes"),
        (torch.full((4, 32), 1e30), good, "beyond fp16"),
    ):
        with pytest.raises(CoaloraError, match=message):
            GPTQ.quantize(weight, SOME[0], statistics)


@needs_gptqmodel
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_packed_base_holds_the_weights_that_were_evaluated_and_loads_without_gptqmodel(
    tiny_models, class_split, tmp_path, monkeypatch, family
) -> None:
    """36 and 52 input features: no group divides them; Conv1D stores the transpose."""
    model = tiny_models[family]()
    layers = find_target_layers(model)[:3]
    statistics = collect_statistics(model, layers, class_split, batch_size=5, hessians=True)
    space = ChoiceSpace("gptq", bits=[2, 4], group_size=[32])
    weights = [layer.matrix(model.get_submodule(layer.name).weight.data) for layer in layers]
    tables = calibration_tables(layers, space, error_table(weights, statistics, space), "base")
    configuration = np.arange(len(layers)) % len(space)
    write_base(tmp_path, model, tables, configuration, task="language-modeling", statistics=statistics)
    QuantizedBase(model, layers, space, statistics=statistics).switch(configuration)
    monkeypatch.setattr(gptq_solver, "find_spec", lambda name: None)
    loaded = load_base(tmp_path, device=torch.device("cpu")).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())
