"""Two processes train as one does on all of their examples, on real process groups (Gloo, on the CPU)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from coalora.adapt.adapted import AdaptedModel
from coalora.data.benchmark import pad
from coalora.models.targets import find_target_layers
from coalora.quant.space import ChoiceSpace
from coalora.recipes import AdapterRecipe, TrainingRecipe
from coalora.train.loop import train
from coalora.train.parallel import Parallel, spawn

BITS = np.array([2.1, 3.1, 4.1, 8.1])


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide GPUs here and, by the environment, in the processes that are started: two would be needed."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def small_training(
    configurations: str, batch_size: int, sampling: str, steps: int, parallel: bool
) -> dict[str, object]:
    """Importable by name: what each process runs. Everything is made from seeds, as a new process has nothing."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).requires_grad_(False).eval()
    space = ChoiceSpace("nf", scale_bits=[8], scale_dtype=["bf16"], block_size=[16], scale_block_size=[64])
    layers = find_target_layers(model)
    recipe = AdapterRecipe(r=4, lora_alpha=4, theta="all", compensation_rank=0, expert_bits=3, expert_start="zero")
    adapted = AdaptedModel(model, layers, space, "language-modeling", method="coa", recipe=recipe, seed=0)
    for lora_B in adapted.lora_B:
        torch.nn.init.normal_(lora_B.weight, std=0.1, generator=torch.Generator().manual_seed(2))
    # Equal lengths: the mean over two halves is the mean over the whole.
    generator = torch.Generator().manual_seed(1)
    split = pad([torch.randint(1, 64, (9,), generator=generator).tolist() for _ in range(12)], 0)
    members = np.repeat(np.arange(4)[:, None], len(layers), axis=1)
    how = TrainingRecipe(
        batch_size=batch_size, lr=1e-2, theta_lr=1e-2, sampling=sampling, sampling_power=1.0, paired=False
    )
    among = Parallel.from_environment(configurations) if parallel else None
    state, records = train(adapted, split, members, BITS, how, steps=steps, total_steps=steps, seed=3, parallel=among)
    return {**state.tensors, "losses": [r["loss"] for r in records], "bits": [r["bits"] for r in records]}


def test_two_processes_on_one_configuration_take_the_steps_of_one_with_twice_the_batch() -> None:
    both = spawn(small_training, 2, "same", 3, "low-bits", 5, True)
    alone = small_training("same", 6, "low-bits", 5, False)
    assert both["bits"] == alone["bits"]
    assert both["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    tensors = [k for k, v in alone.items() if isinstance(v, torch.Tensor)]
    assert any(k.startswith("experts.") for k in tensors)
    for name in tensors:
        torch.testing.assert_close(both[name], alone[name], rtol=2e-3, atol=2e-4, msg=name)


def test_processes_with_configurations_of_their_own_draw_what_one_process_would_in_turn() -> None:
    both = spawn(small_training, 2, "own", 3, "adaptive", 6, True)
    assert len(both["losses"]) == 6
    drawn = []
    alone = small_training("own", 3, "uniform", 12, False)  # adaptive is uniform until it has seen the set twice
    for first, second in zip(alone["bits"][0::2], alone["bits"][1::2], strict=True):
        drawn.append((first + second) / 2)
    assert both["bits"][:4] == pytest.approx(drawn[:4])
    assert float(both["sampler.count"].sum()) == 12  # every process observed the losses of both


def failing() -> dict[str, object]:
    if Parallel.from_environment().rank == 1:
        raise ValueError("process one fails")
    return {}


def test_a_failing_process_ends_the_others_and_is_heard() -> None:
    with pytest.raises(Exception, match="process one fails"):
        spawn(failing, 2)


def test_a_single_process_needs_no_group() -> None:
    alone = Parallel()
    parameter = torch.nn.Parameter(torch.ones(3))
    alone.average_gradients([parameter])
    assert parameter.grad is None
    assert alone.draw_step(7) == alone.batch_step(7) == 7
    assert alone.gather(torch.ones(2)).shape == (1, 2)
