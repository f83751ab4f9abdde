"""Training of theta, the shared pair and the task head over a set of configurations.

CoA-LoRA (arXiv 2509.25214), section 3: each step draws a configuration of the training set, switches the base's weights
to it and takes one gradient step on everything that is trained. Linear biases of the base stay as they are (the
published code removes them).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from coalora.adapt.adapted import AdaptedModel
from coalora.data.benchmark import Split
from coalora.errors import CoaloraError
from coalora.train.sampling import Sampling, batch_indices, sample_member

_MOMENTS = ("exp_avg.", "exp_avg_sq.")


@dataclass(frozen=True)
class TrainingRecipe:
    """How training goes on; learning rates rise over `warmup_steps` and fall to a tenth along a cosine.

    `total_steps` spans all rounds: the schedule does not start again with every round.
    """

    total_steps: int
    batch_size: int = 32
    lr: float = 1e-4
    theta_lr: float = 1e-4
    head_lr: float = 1e-4
    weight_decay: float = 0.0
    warmup_steps: int = 20
    max_grad_norm: float = 1.0
    sampling: Sampling = "low-bits"
    sampling_power: float = 2.5


@dataclass
class TrainingState:
    """What training needs to go on: parameters, AdamW's moments, and the steps done.

    `tensors` holds `<parameter>`, `exp_avg.<parameter>` and `exp_avg_sq.<parameter>`.
    """

    step: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)


def train(
    adapted: AdaptedModel,
    split: Split,
    configurations: np.ndarray,
    average_bits: np.ndarray,
    recipe: TrainingRecipe,
    *,
    steps: int,
    seed: int,
    state: TrainingState | None = None,
    progress: Callable[..., None] | None = None,
) -> tuple[TrainingState, list[dict[str, float]]]:
    """Train for `steps` more steps and return the new state with one record a step (step, loss, lr, bits).

    Args:
        adapted: the model; its parameters are replaced by those of `state` where one is given.
        configurations: (n, N) the training set, `average_bits` (n,) its bits.
        state: where an earlier call stopped; None starts from the model as it is.

    Afterwards the model is in eval mode and holds the last step's configuration, adjusted by theta as it is now.

    Raises:
        CoaloraError: an empty set or one without its bits; nothing to train; too many steps; the state of another
            model; a loss or a gradient that is not finite (before it has reached any parameter).
    """
    if len(configurations) == 0 or len(configurations) != len(average_bits):
        raise CoaloraError(
            "training draws from a set of at least one configuration, each with its bits",
            got=f"{len(configurations)} configurations, {len(average_bits)} average bits",
        )
    if state is not None and state.tensors:
        adapted.load_state_dict({k: v for k, v in state.tensors.items() if not k.startswith(_MOMENTS)})
    start = state.step if state else 0
    parameters = adapted.named_parameters()
    if not parameters:
        raise CoaloraError("the method must have something to train", got=f"method {adapted.method!r}")
    if start + steps > recipe.total_steps:
        raise CoaloraError(
            "training stays inside its schedule", got=f"{start} + {steps} steps", expected=recipe.total_steps
        )
    optimizer = _optimizer(parameters, recipe, state)
    records = []
    adapted.peft_model.train()
    for step in range(start, start + steps):
        member = sample_member(
            average_bits, sampling=recipe.sampling, power=recipe.sampling_power, seed=seed, step=step
        )
        indices = batch_indices(len(split), recipe.batch_size, seed=seed, step=step)
        scale = _schedule(step, recipe)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * scale
        torch.manual_seed(seed * 1_000_003 + step)  # dropout, so that a resumed step equals an undisturbed one
        adapted.switch(configurations[member])
        loss = adapted.peft_model(**split.batch(indices, adapted.device)).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), recipe.max_grad_norm)
        # Both in one transfer. A finite loss can have a gradient that is not, and clipping spreads it everywhere.
        value, gradient = torch.stack([loss.detach().float(), norm.float()]).tolist()
        if not (math.isfinite(value) and math.isfinite(gradient)):
            optimizer.zero_grad(set_to_none=True)
            raise CoaloraError(
                "the training loss and its gradient must stay finite",
                got=f"loss {value}, gradient norm {gradient} at step {step} ({average_bits[member]:.2f} bits)",
                remedy="lower training.lr",
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        records.append({"step": step, "loss": value, "lr": recipe.lr * scale, "bits": float(average_bits[member])})
        if progress:
            progress(step - start + 1, steps, loss=float(np.mean([r["loss"] for r in records[-20:]])))
    adapted.peft_model.eval()
    adapted.refresh()
    return TrainingState(start + steps, _tensors(parameters, optimizer)), records


def _optimizer(
    parameters: dict[str, torch.nn.Parameter], recipe: TrainingRecipe, state: TrainingState | None
) -> torch.optim.AdamW:
    peaks = {"lora": recipe.lr, "theta": recipe.theta_lr, "head": recipe.head_lr}
    groups = []
    for name, peak in peaks.items():
        members = [p for key, p in parameters.items() if key.startswith(name + ".")]
        if members:
            groups.append({"params": members, "lr": peak, "peak_lr": peak})
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay)
    if state is not None and state.step:
        for key, parameter in parameters.items():
            optimizer.state[parameter] = {
                "step": torch.tensor(float(state.step)),
                "exp_avg": state.tensors[f"exp_avg.{key}"].to(parameter, copy=True),
                "exp_avg_sq": state.tensors[f"exp_avg_sq.{key}"].to(parameter, copy=True),
            }
    return optimizer


def _tensors(parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for key, parameter in parameters.items():
        moments = optimizer.state[parameter]
        tensors[key] = parameter.detach().to("cpu", copy=True)
        # A parameter that no step reached (theta without a layer of some kind) has no moments yet.
        for name in ("exp_avg", "exp_avg_sq"):
            value = moments.get(name, torch.zeros_like(parameter))
            tensors[f"{name}.{key}"] = value.detach().to("cpu", copy=True)
    return tensors


def _schedule(step: int, recipe: TrainingRecipe) -> float:
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    span = max(recipe.total_steps - recipe.warmup_steps, 1)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - recipe.warmup_steps) / span))
