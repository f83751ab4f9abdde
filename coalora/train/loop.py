"""Training of theta, the shared pair and the task head over a set of configurations.

CoA-LoRA (arXiv 2509.25214), section 3: each step draws a configuration of the training set, switches the base's weights
to it and takes one gradient step on everything that is trained. Linear biases of the base stay as they are (the
published code removes them).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from coalora.adapt.adapted import AdaptedModel
from coalora.data.benchmark import Split
from coalora.errors import CoaloraError
from coalora.recipes import Compile, TrainingRecipe
from coalora.train.checkpoint import Checkpoint, Checkpoints, uninterrupted
from coalora.train.graph import GraphedGradients, GraphedTeacher, captured, eager_gradients, eager_teacher
from coalora.train.parallel import Parallel, Stopped, stop_asked
from coalora.train.sampling import LossEstimates, Sampler, batch_indices

_MOMENTS = ("exp_avg.", "exp_avg_sq.", "step.")
_SAMPLER = "sampler."
ASIDE = (*_MOMENTS, _SAMPLER)  # prefixes of what is no parameter in a state
# Losses come to the host once in so many steps: a step that waits for its own loss leaves a GPU idle.
_FLUSH = 10


@dataclass
class TrainingState:
    """State that training goes on from: parameters, AdamW's moments, and the steps done.

    `tensors` holds `<parameter>`, `exp_avg.<parameter>`, `exp_avg_sq.<parameter>` and `step.<parameter>` (the
    steps that reached it: an expert sees those of its own bits alone), and under `sampler.` what the
    adaptive sampler has learnt of the losses.
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
    total_steps: int,
    state: TrainingState | None = None,
    parallel: Parallel | None = None,
    progress: Callable[..., None] | None = None,
    checkpoints: Checkpoints | None = None,
    compile: Compile = "none",
) -> tuple[TrainingState, list[dict[str, float]]]:
    """Train for `steps` more steps and return the new state with one record a step (step, loss, lr, bits).

    Args:
        adapted: the model; its parameters are replaced by those of `state` where one is given.
        configurations: (n, N) the training set, `average_bits` (n,) its bits.
        total_steps: length of the learning-rate schedule, which spans all calls that go on from one another.
        parallel: this process among several; each calls `train` with the same arguments and gets the same state.
        state: where an earlier call stopped; None starts from the model as it is.
        checkpoints: where the same call, if it broke off, goes on from. It is written as time goes by, and when an
            interrupt, a termination signal or a time limit stops the call; who made it removes it. The steps that are
            done again after a kill, and so the result, are those of an undisturbed call bit for bit.
        compile: cuda-graph launches the passes of a step as CUDA graphs (`coalora.train.graph`), auto where it can and
            batches have one shape. Losses are those of a call without up to rounding.

    Afterwards the model is in eval mode and holds the last step's configuration, adjusted by theta as it is now.

    Raises:
        CoaloraError: an empty set or one without its bits; nothing to train; too many steps; the state of another
            model; graphs where there can be none; a loss or a gradient that is not finite (before it has reached any
            parameter).
    """
    if len(configurations) == 0 or len(configurations) != len(average_bits):
        raise CoaloraError(
            f"Training got {len(configurations)} configurations with {len(average_bits)} average bits",
            remedy="Give at least one configuration, each with its bits",
        )
    recipe = recipe.resolved(task="language-modeling" if adapted.is_language_model else "classification")
    begin = state.step if state else 0
    span = (begin, begin + steps)
    resumed = checkpoints.load(span) if checkpoints else None
    if resumed is not None:
        state = TrainingState(resumed.step, resumed.tensors)
    if state is not None and state.tensors:
        adapted.load_state_dict({k: v for k, v in state.tensors.items() if not k.startswith(ASIDE)})
    start = state.step if state else 0
    parameters = adapted.named_parameters()
    if not parameters:
        raise CoaloraError(f"Method {adapted.method!r} has nothing to train here", remedy="Train another method")
    if span[1] > total_steps:
        raise CoaloraError(
            f"{begin} + {steps} steps are more than the schedule's {total_steps}",
            remedy="Ask for fewer steps, or raise total_steps",
        )
    optimizer = _optimizer(parameters, recipe, state)
    parallel = parallel or Parallel()
    sampler = Sampler(
        average_bits, sampling=recipe.sampling, power=recipe.sampling_power, seed=seed,
        total_steps=parallel.world_size * total_steps, estimates=_read_estimates(state),
    )  # fmt: skip
    records: list[dict[str, float]] = list(resumed.records) if resumed else []
    pending: list[tuple[int, Tensor]] = [(n, v.to(adapted.device)) for n, v in resumed.pending] if resumed else []
    done, whole = start, True  # whole: the state is that after `done` steps, and of no other

    def flush() -> None:
        """Bring the losses of the last steps to the host, in one transfer."""
        nonlocal whole
        # (processes, steps, 2 and the members): every process observes the losses of all, so that all draw alike.
        values = parallel.gather(torch.stack([v for _, v in pending])).transpose(0, 1).tolist()
        with uninterrupted():
            whole = False
            for (step, _), rows in zip(pending, values, strict=True):
                _check_finite(step, rows, average_bits)
                for loss, _, *members in rows:
                    sampler.observe(int(members[0]), loss)
                loss = float(np.mean([row[0] for row in rows]))
                bits = float(np.mean([average_bits[int(member)] for row in rows for member in row[2:]]))
                lr = recipe.lr * _schedule(step, recipe.warmup_steps, total_steps)
                records.append({"step": step, "loss": loss, "lr": lr, "bits": bits})
            pending.clear()
            whole = True
        if progress:
            progress(len(records), steps, loss=float(np.mean([r["loss"] for r in records[-20:]])))

    def save() -> None:
        if checkpoints and parallel.rank == 0:
            tensors = _tensors(parameters, optimizer) | _write_estimates(sampler)
            checkpoints.save(span, Checkpoint(done, tensors, records, pending))

    def pause(flushed: bool) -> None:
        """Write a checkpoint where one is due. Processes agree on it, and on stopping, when they exchange losses."""
        if parallel.world_size == 1:
            if checkpoints and checkpoints.due(done):
                save()
        elif flushed:
            stop, due = parallel.any(stop_asked(), checkpoints is not None and checkpoints.due(done))
            if stop or due:
                save()
                parallel.any(False)  # none leaves before the checkpoint is whole
            if stop:
                raise Stopped(f"stopped at step {done}")

    paired = recipe.paired and len(configurations) > 1  # one configuration has no counterpart
    graph = captured(compile, adapted, split, recipe)
    gradients = (GraphedGradients if graph else eager_gradients)(adapted, recipe.objective)
    teach = (GraphedTeacher if graph else eager_teacher)(adapted, recipe.objective)
    model = cast(PreTrainedModel, adapted.peft_model.get_base_model())
    if recipe.gradient_checkpointing:  # activations are computed again in the backward pass instead of kept
        _checkpointing(model, "enable")({"use_reentrant": False})
    adapted.peft_model.train()
    try:
        for step in range(start, span[1]):
            sides = (False, True) if paired else (False,)
            drawn = [sampler.draw(parallel.draw_step(step), opposite=side) for side in sides]
            rate = _schedule(step, recipe.warmup_steps, total_steps)
            if recipe.lr_by_bits:
                rate *= float(np.mean(average_bits[drawn]) / np.mean(average_bits)) ** recipe.lr_by_bits
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * rate
            indices = batch_indices(len(split), recipe.batch_size, seed=seed, step=parallel.batch_step(step))
            losses = []
            for member, part in zip(drawn, indices.chunk(len(drawn)), strict=True):
                batch = split.batch(part, adapted.device)
                teacher = teach(batch)
                # Dropout: a resumed step equals an undisturbed one.
                torch.manual_seed(seed * 1_000_003 + parallel.batch_step(step))
                adapted.switch(configurations[member])
                losses.append(gradients(batch, teacher))
            loss, task_loss = (torch.stack(values).mean() for values in zip(*losses, strict=True))
            if paired:
                torch._foreach_div_([p.grad for p in parameters.values() if p.grad is not None], len(drawn))
            parallel.average_gradients(list(parameters.values()))
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), recipe.max_grad_norm).float()
            # A finite loss can have a gradient that is not, and clipping spreads it everywhere: such a step is left out
            # on the device, without asking the host.
            finite = torch.isfinite(norm) if parallel.world_size > 1 else torch.isfinite(norm + loss.detach())
            optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            # A member's number is exact in float32 up to 16 million members.
            numbers = [torch.full((), float(member), device=adapted.device) for member in drawn]
            values = torch.stack([task_loss.detach().float(), torch.where(finite, norm, torch.nan), *numbers])
            with uninterrupted():
                whole = False
                optimizer.step()
                pending.append((step, values))
                done, whole = step + 1, True
            optimizer.zero_grad(set_to_none=True)
            flushed = done % _FLUSH == 0
            if flushed:
                flush()
            pause(flushed)
        if pending:
            flush()
    except BaseException as error:
        # Interrupted, cancelled or out of time, at whatever line: the parameters are still those of the last step.
        interrupted = isinstance(error, TimeoutError) or not isinstance(error, Exception)
        if interrupted and whole and done > start and parallel.world_size == 1 and checkpoints:
            optimizer.zero_grad(set_to_none=True)
            save()
            checkpoints.notify(f"stopped at step {done - begin} of {steps}; a checkpoint is kept for the next run")
        raise
    finally:
        optimizer.zero_grad(set_to_none=True)
        if recipe.gradient_checkpointing:
            _checkpointing(model, "disable")()
        adapted.peft_model.eval()
    adapted.refresh()
    return TrainingState(span[1], _tensors(parameters, optimizer) | _write_estimates(sampler)), records


def _check_finite(step: int, rows: list[list[float]], average_bits: np.ndarray) -> None:
    for loss, norm, *members in rows:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            bits = " and ".join(f"{average_bits[int(member)]:.2f}" for member in members)
            raise CoaloraError(
                f"Training is no longer finite: loss {loss}, gradient norm {norm} at step {step} ({bits} bits)",
                remedy="Lower training.lr",
            )


def _read_estimates(state: TrainingState | None) -> LossEstimates | None:
    if state is None or f"{_SAMPLER}bits" not in state.tensors:
        return None
    return LossEstimates(*(state.tensors[_SAMPLER + name].numpy() for name in ("bits", "loss", "count")))


def _write_estimates(sampler: Sampler) -> dict[str, Tensor]:
    if sampler.sampling != "adaptive":
        return {}
    return {_SAMPLER + name: torch.from_numpy(array.copy()) for name, array in vars(sampler.estimates).items()}


def _optimizer(
    parameters: dict[str, torch.nn.Parameter], recipe: TrainingRecipe, state: TrainingState | None
) -> torch.optim.AdamW:
    peaks = {"lora": recipe.lr, "theta": recipe.theta_lr, "experts": recipe.lr, "head": recipe.head_lr}
    groups = []
    for name, peak in peaks.items():
        members = [p for key, p in parameters.items() if key.startswith(name + ".")]
        if members:
            groups.append({"params": members, "lr": peak, "peak_lr": peak})
    # Fused: one pass over each parameter, and a step that found_inf forbids is left out without a host's word.
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay, fused=True)
    if state is not None and state.step:
        for key, parameter in parameters.items():
            optimizer.state[parameter] = {
                "step": state.tensors[f"step.{key}"].to(parameter.device, copy=True),
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
        blank = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        for name, nothing in {**blank, "step": torch.tensor(0.0)}.items():
            value = moments.get(name, nothing)
            tensors[f"{name}.{key}"] = value.detach().to("cpu", copy=True)
    return tensors


def _schedule(step: int, warmup_steps: int, total_steps: int) -> float:
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    span = max(total_steps - warmup_steps, 1)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup_steps) / span))


def _checkpointing(model: PreTrainedModel, verb: str) -> Callable[..., None]:
    # transformers 5 has renamed these methods, and warns of the old names.
    return getattr(model, f"activation_checkpointing_{verb}", None) or getattr(model, f"gradient_checkpointing_{verb}")
