"""A step's forward and backward passes as one CUDA graph, launched at once instead of kernel by kernel, and the
teacher's pass as another.

What is captured is the model: from the factors of all layers and a batch to the losses and the gradients of those
factors. It depends on the configuration by numbers alone, which stay where they are: a switch writes weights in place,
and factors are copied in. What depends on it by structure stays outside: theta, the experts of a configuration's bits,
the sums and products that make the factors, clipping, and AdamW; a few dozen launches that a GPU does not wait for.

The teacher is captured on the masters themselves (`QuantizedBase.in_full_precision`), which never move: a step writes
no weights for it, and its graph is of no configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from coalora.adapt.adapted import AdaptedModel
from coalora.data.benchmark import Split
from coalora.errors import CoaloraError
from coalora.recipes import Compile, Objective, TrainingRecipe, graph_obstacle
from coalora.train.objective import TeacherOutput, ask_teacher, step_loss

_WARMUP = 3  # passes before a capture: libraries choose their kernels and take their workspaces
# Shapes of batches with a graph each, the first to come; a graph keeps the memory of its activations, so others run
# without one.
_SHAPES = 8
_STATIC = 0.9  # share of examples of full length from which nearly all batches have one shape

Losses = tuple[Tensor, Tensor]
Ask = Callable[[dict[str, Tensor]], TeacherOutput | None]


def captured(compile: Compile, adapted: AdaptedModel, split: Split, recipe: TrainingRecipe) -> bool:
    """Whether a training captures its steps: where it is asked to, and for `auto` where it can and shapes are static.

    Shapes of which each comes a few times cost a capture and the memory of a graph each, and save little.

    Raises:
        CoaloraError: it is asked to and cannot.
    """
    obstacle = graph_obstacle(adapted.device.type, adapted.base.weight_mode, adapted.recipe, recipe)
    if compile == "cuda-graph" and obstacle:
        raise CoaloraError(f"runtime.compile is cuda-graph, with {obstacle}", remedy="Set runtime.compile to auto")
    full = (split.lengths == split.lengths.max()).float().mean()
    return compile == "cuda-graph" or (compile == "auto" and obstacle is None and bool(full >= _STATIC))


def eager_teacher(adapted: AdaptedModel, objective: Objective) -> Ask:
    """batch -> `ask_teacher`."""
    return lambda batch: ask_teacher(adapted, batch, objective)


def eager_gradients(adapted: AdaptedModel, objective: Objective) -> Callable[..., Losses]:
    """(batch, teacher) -> `step_loss`, with its gradients in the parameters."""

    def gradients(batch: dict[str, Tensor], teacher: TeacherOutput | None) -> Losses:
        loss, task_loss = step_loss(adapted, batch, objective, teacher)
        loss.backward()
        return loss, task_loss

    return gradients


class _Graphed:
    """A computation on a batch and on factors, by a graph for each shape of a batch.

    Args:
        adapted: the model, on a GPU.
        objective: what a step minimises.
        capture: False runs what would be captured, on any device, with outputs at a graph's fixed addresses.
    """

    def __init__(self, adapted: AdaptedModel, objective: Objective, *, capture: bool = True) -> None:
        self._adapted, self._objective, self._capture = adapted, objective.resolved(), capture
        self._recorded: dict[Any, _Recorded] = {}

    def run(self, names: Sequence[str], given: Sequence[Tensor], factors: Sequence[Tensor]) -> Any:
        """What is captured: outputs that depend on tensors `given`, the first of which have `names`, and factors."""
        raise NotImplementedError

    def _outputs(self, names: Sequence[str], given: Sequence[Tensor], factors: Sequence[Tensor]) -> Any:
        """`run` by the graph of this shape; overwritten by the next call."""
        key = (*names, *((tensor.shape, tensor.dtype) for tensor in given))
        if key not in self._recorded and len(self._recorded) < _SHAPES:
            self._recorded[key] = _Recorded(self.run, names, given, factors, self._capture)
        if key in self._recorded:
            return self._recorded[key](given, factors)
        return self.run(names, given, [factor.detach().requires_grad_() for factor in factors])


class GraphedTeacher(_Graphed):
    """`eager_teacher` by a graph for each shape of a batch, on masters that the model can compute with."""

    def __call__(self, batch: dict[str, Tensor]) -> TeacherOutput | None:
        if self._objective.distillation == 0 or not self._adapted.base.masters_serve:
            return ask_teacher(self._adapted, batch, self._objective)
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        alone = self._objective.teacher == "base"
        factors = [] if alone else self._adapted.terms.plain_stacks()
        logits, *hidden = self._outputs(list(inputs), list(inputs.values()), factors)
        return TeacherOutput(logits, tuple(hidden))

    def run(self, names: Sequence[str], given: Sequence[Tensor], factors: Sequence[Tensor]) -> Any:
        """Logits and hidden states of a batch."""
        batch = dict(zip(names, given, strict=True))
        found = ask_teacher(self._adapted, batch, self._objective, factors=factors)
        assert found is not None
        return [found.logits, *found.hidden_states]


class GraphedGradients(_Graphed):
    """`eager_gradients` by a graph for each shape of a batch; losses it returns are overwritten by the next call."""

    def __init__(self, adapted: AdaptedModel, objective: Objective, *, capture: bool = True) -> None:
        super().__init__(adapted, objective, capture=capture)
        heads = {id(p) for name, p in adapted.named_parameters().items() if name.startswith("head.")}
        self._parameters = list(adapted.named_parameters().values())
        self._heads = [
            (module, name, parameter)
            for module in adapted.peft_model.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if id(parameter) in heads
        ]

    def __call__(self, batch: dict[str, Tensor], teacher: TeacherOutput | None) -> Losses:
        # A gradient may lie in the graph's own memory, which this call overwrites: those of a call before are kept.
        before = [(p, p.grad.clone()) for p in self._parameters if p.grad is not None]
        for parameter, _ in before:
            parameter.grad = None
        factors = self._adapted.terms.stacks()
        given = [*batch.values(), *([] if teacher is None else [teacher.logits, *teacher.hidden_states])]
        losses, gradients = self._outputs(list(batch), given, factors)
        trained = [(f, g) for f, g in zip(factors, gradients, strict=False) if f.requires_grad and g is not None]
        if trained:
            torch.autograd.backward([f for f, _ in trained], [g for _, g in trained])
        for (_, _, parameter), gradient in zip(self._heads, gradients[len(factors) :], strict=True):
            parameter.grad = gradient
        for parameter, gradient in before:
            parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)
        return losses

    def run(self, names: Sequence[str], given: Sequence[Tensor], factors: Sequence[Tensor]) -> Any:
        """(losses, gradients of factors and heads) of a batch whose tensors are `given`, a teacher's behind them."""
        batch = dict(zip(names, given, strict=False))
        rest = given[len(names) :]
        teacher = TeacherOutput(rest[0], tuple(rest[1:])) if rest else None
        with torch.enable_grad(), self._adapted.terms.using(factors), self._leaves() as leaves:
            loss, task_loss = step_loss(self._adapted, batch, self._objective, teacher)
            gradients = torch.autograd.grad(loss, [*factors, *leaves], allow_unused=True)
        return (loss.detach(), task_loss.detach()), gradients

    @contextmanager
    def _leaves(self) -> Iterator[list[nn.Parameter]]:
        """The heads' parameters, replaced by leaves of the same memory.

        The node that accumulates a parameter's gradient stays on the stream that first used it, as long as any result
        of that use lives: a capture would wait for that stream, which CUDA forbids.
        """
        leaves = [nn.Parameter(parameter.detach()) for _, _, parameter in self._heads]
        try:
            for (module, name, _), leaf in zip(self._heads, leaves, strict=True):
                module.register_parameter(name, leaf)
            yield leaves
        finally:
            for module, name, parameter in self._heads:
                module.register_parameter(name, parameter)


class _Recorded:
    """The graph of one shape: its inputs, its outputs, and how to run it."""

    def __init__(
        self,
        run: Callable[..., Any],
        names: Sequence[str],
        given: Sequence[Tensor],
        factors: Sequence[Tensor],
        capture: bool,
    ) -> None:
        self._run_on, self._names = run, list(names)
        self._given = [tensor.clone() for tensor in given]
        self._factors = [factor.detach().clone().requires_grad_() for factor in factors]
        self._graph: torch.cuda.CUDAGraph | None = None
        if not capture:
            self._outputs = _at(None, self._run())
            return
        generator = torch.cuda.get_rng_state()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_WARMUP):
                self._run()
        torch.cuda.current_stream().wait_stream(aside)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._outputs = self._run()
        torch.cuda.set_rng_state(generator)

    def _run(self) -> Any:
        return self._run_on(self._names, self._given, self._factors)

    def __call__(self, given: Sequence[Tensor], factors: Sequence[Tensor]) -> Any:
        with torch.no_grad():
            for own, tensor in zip(self._given, given, strict=True):
                own.copy_(tensor)
            if self._factors:
                torch._foreach_copy_(self._factors, list(factors))
        if self._graph is None:
            return _at(self._outputs, self._run())
        self._graph.replay()
        return self._outputs


def _at(place: Any, outputs: Any) -> Any:
    """Outputs (tensors and None, nested) at the addresses of those of a call before; without any, at addresses of their
    own."""
    if isinstance(outputs, Tensor):
        return outputs.detach().clone() if place is None else place.copy_(outputs.detach())
    if outputs is None:
        return None
    places = [None] * len(outputs) if place is None else place
    return [_at(one, output) for one, output in zip(places, outputs, strict=True)]
