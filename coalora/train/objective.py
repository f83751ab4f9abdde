"""Loss of a training step: the task's loss, distillation from the full-precision model, or both.

Distillation (Hinton et al. 2015, arXiv 1503.02531): tau^2 KL(teacher || student) of the softened outputs, averaged over
examples or predicted tokens; optionally the mean squared difference of the hidden states of every block, or of the last
one (RILQ, arXiv 2412.01129), relative to the teacher's own mean square. Two teachers:

`base`    the full-precision base without adapter: what quantization took away, and no more. To recover.
`adapted` the full-precision base with the shared adapter as it is now, without gradient (the in-place distillation of
          slimmable networks, Yu and Huang 2019, arXiv 1903.05134): it learns the task as training goes on. To
          fine-tune, and for classifiers, whose base has no trained head.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from coalora.adapt.adapted import AdaptedModel
from coalora.data.benchmark import IGNORED
from coalora.recipes import Objective


@dataclass(frozen=True)
class TeacherOutput:
    """Logits, and hidden states of every block where the objective asks for them; without gradient."""

    logits: Tensor
    hidden_states: tuple[Tensor, ...]


def ask_teacher(
    adapted: AdaptedModel, batch: dict[str, Tensor], objective: Objective, *, factors: Sequence[Tensor] = ()
) -> TeacherOutput | None:
    """The teacher's outputs for a batch; None where nothing is distilled. Switch the model afterwards.

    What the objective leaves open is as to fine-tune.

    Args:
        factors: of the shared adapter (`Terms.stacks`); without, they are made.
    """
    objective = objective.resolved()
    if objective.distillation == 0:
        return None
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with (
        torch.no_grad(),
        adapted.in_full_precision(adapter=objective.teacher != "base") as teacher,
        adapted.terms.using(factors) if factors else nullcontext(),
    ):
        out = teacher(**inputs, output_hidden_states=objective.hidden > 0)
    return TeacherOutput(out.logits, tuple(out.hidden_states or ()))


def step_loss(
    adapted: AdaptedModel, batch: dict[str, Tensor], objective: Objective, teacher: TeacherOutput | None
) -> tuple[Tensor, Tensor]:
    """(what is minimised, the task's loss without gradient), both scalars, of the configuration held now."""
    hidden = teacher is not None and objective.hidden > 0
    out = adapted.peft_model(**batch, output_hidden_states=hidden)
    if teacher is None:
        return out.loss, out.loss.detach()
    weight, tau = objective.distillation or 0.0, objective.temperature
    student, target = out.logits, teacher.logits
    counted = torch.ones_like(student[..., 0])
    if adapted.is_language_model:
        student, target = student[:, :-1], target[:, :-1]
        counted = (batch["labels"][:, 1:] != IGNORED).to(student.dtype)
    divergence = F.kl_div(
        F.log_softmax(student.float() / tau, -1), F.log_softmax(target.float() / tau, -1),
        log_target=True, reduction="none",
    ).sum(-1)  # fmt: skip
    # A product instead of an index: indexing by a mask would wait for the device.
    distance = objective.outputs * tau**2 * (divergence * counted).sum() / counted.sum()
    if hidden:
        # The first hidden states are the embeddings, which nothing changes.
        compared = slice(-1 if objective.states == "last" else 1, None)
        error = _hidden_error(out.hidden_states[compared], teacher.hidden_states[compared], batch)
        distance = distance + objective.hidden * error
    if weight == 1:  # nothing to go back through the task's loss for
        return distance, out.loss.detach()
    return (1 - weight) * out.loss + weight * distance, out.loss.detach()


def _hidden_error(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], batch: dict[str, Tensor]) -> Tensor:
    mask = batch["attention_mask"][..., None].float()
    errors = []
    for own, wanted in zip(student, teacher, strict=True):
        difference = ((own.float() - wanted.float()).square() * mask).sum()
        errors.append(difference / (wanted.float().square() * mask).sum())
    return torch.stack(errors).mean()
