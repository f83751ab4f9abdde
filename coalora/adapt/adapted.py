"""A base model that is quantized to any configuration and adapted to it.

y = q(W, c) x + s B (I + U) A x, with what `coalora.adapt.methods` says of the method: theta's adjustment U or none,
terms for low bit-widths and the closed-form compensation of each choice beside the pair, or no pair at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from coalora.adapt.compensation import CompensationTable, as_large_as_lora, compensating_lora_B, compensation
from coalora.adapt.experts import Experts, adjusted_choices, cascaded, used_ranks
from coalora.adapt.lora import ADAPTER, attach, lora_config
from coalora.adapt.methods import METHODS
from coalora.adapt.theta import ConfigurationAwareModel
from coalora.errors import CoaloraError
from coalora.models.switching.quantized import FULL_PRECISION, QuantizedBase
from coalora.models.targets import TargetLayer, head_modules
from coalora.quant.scheme import InputStatistics
from coalora.quant.space import ChoiceSpace
from coalora.recipes import AdapterRecipe, Task
from coalora.threads import each, n_threads


class AdaptedModel:
    """Base, adapter and theta as one model that takes any configuration.

    Args:
        model: the base model; it is wrapped in place.
        layers, space: as in `QuantizedBase`.
        task: decides PEFT's task type, and so whether a head is trained.
        method: a name of `METHODS`.
        recipe: the adapter's sizes; what it leaves open is decided by the task.
        seed: initial adapter and theta; the same seed gives methods of equal trained rank the same initial pair, but
            for a start of experts, which aligns lora_A to it.
        compensation: factors by (layer, choice) that are known already; others are computed when first needed.
        start: whether experts are set to their start; False spares the time where a state is loaded anyway.
        statistics: of the layers' inputs, for calibrated schemes and for compensation.
        memory: `cache_bytes`, `master`, `weights`, `checkpoint` and `device` of `QuantizedBase`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[TargetLayer],
        space: ChoiceSpace,
        task: Task,
        *,
        method: str,
        recipe: AdapterRecipe,
        seed: int,
        statistics: Sequence[InputStatistics] | None = None,
        compensation: dict[tuple[int, int], tuple[Tensor, Tensor]] | None = None,
        start: bool = True,
        **memory: Any,
    ) -> None:
        self.method, described = method, METHODS[method]
        self.is_language_model = task == "language-modeling"
        self.recipe = recipe = recipe.resolved(task)
        self.layers = list(layers)
        self.base = QuantizedBase(model, layers, space, statistics=statistics, **memory)
        self.device = next(model.parameters()).device
        self.ranks = recipe.ranks(layers)
        self.compensation: CompensationTable | None = None
        compensated = (recipe.compensation_rank or 0) if described.follows_choices else 0
        if compensated:
            self.compensation = CompensationTable(
                self.base.residual,
                _known(statistics),
                [compensated] * len(layers),
                cache_bytes=self.base.cache.limit,
                known=compensation,
            )
        self._known_statistics = statistics
        trained = [rank - compensated for rank in self.ranks]
        self.heads = [] if self.is_language_model else head_modules(model)
        config = lora_config(
            layers, task, ranks=trained, scale=recipe.scale, lora_dropout=recipe.lora_dropout, heads=self.heads
        )
        self.peft_model, self.lora_A, self.lora_B, self.terms = attach(
            model, layers, config, scale=recipe.scale, seed=seed
        )
        self.theta: ConfigurationAwareModel | None = None
        if described.theta == "all" or (described.theta == "recipe" and recipe.theta != "none"):
            torch.manual_seed(seed + 1)
            self.theta = ConfigurationAwareModel(
                space,
                layers,
                max(trained),
                embedding_dim=recipe.embedding_dim,
                hidden_dim=recipe.hidden_dim,
                adjusted=adjusted_choices(space, recipe) if described.theta == "recipe" else None,
            ).to(self.device)
        used = used_ranks(space, recipe, max(trained)) if described.follows_choices else None
        self.used_ranks = None if used is None else used.to(self.device)
        self.experts: Experts | None = None
        if described.follows_choices and recipe.expert_bits:
            self.experts = Experts(space, layers, trained, max_bits=recipe.expert_bits).to(self.device)
            if recipe.expert_start == "compensation" and start:
                self._start(self.experts)
        if not described.has_lora:
            self._drop_lora()

    @torch.no_grad()
    def _start(self, experts: Experts) -> None:
        """Start every A as the compensation's rows for the lowest bits, and the experts' B at the best fit to them."""
        fits = self.base.space.fits([layer.shape for layer in self.layers])
        chosen = [experts.first_choices(row) for row in fits]
        if not any(chosen):
            return
        statistics = _known(self._known_statistics)

        def start(index: int) -> None:
            lora_A, known = self.lora_A[index], statistics[index]
            residuals = {k: self.base.residual(index, k) for k in chosen[index]}
            if not residuals:
                return
            A, _ = compensation(residuals[chosen[index][0]], known, lora_A.weight.shape[0])
            lora_A.weight.copy_(as_large_as_lora(A, lora_A.weight, known))
            for_choices = {k: compensating_lora_B(left, known, lora_A.weight) for k, left in residuals.items()}
            experts.start(index, {k: B / self.recipe.scale for k, B in for_choices.items()})

        each(start, range(len(self.layers)), n_threads(self.device))

    def _drop_lora(self) -> None:
        for name, parameter in self.peft_model.named_parameters():
            if ".lora_" in name:
                parameter.requires_grad_(False)
        # B is zero at the start and stays so; PEFT's switch skips the products as well. Heads in
        # `modules_to_save` stay active: the switch of the LoRA layers alone is what is wanted.
        base = self.peft_model.get_base_model()
        for layer in self.layers:
            cast(BaseTunerLayer, base.get_submodule(layer.name)).enable_adapters(False)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name: `lora.<module>...`, `head.<module>...`, `theta.<...>`, `experts.<...>`."""
        named: dict[str, nn.Parameter] = {}
        for name, parameter in self.peft_model.named_parameters():
            if parameter.requires_grad:
                group = "lora" if ".lora_" in name else "head"
                named[f"{group}.{_plain(name)}"] = parameter
        for group, module in (("theta", self.theta), ("experts", self.experts)):
            if module is not None:
                named |= {f"{group}.{name}": parameter for name, parameter in module.named_parameters()}
        return named

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the trained parameters, on the CPU."""
        return {k: v.detach().to("cpu", copy=True) for k, v in self.named_parameters().items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` returned.

        Raises:
            CoaloraError: names or shapes differ; nothing has been copied then.
        """
        own = self.named_parameters()
        if unlike := sorted(state.keys() ^ own.keys()):
            raise CoaloraError(
                f"The state's {len(state)} parameters are not the {len(own)} of method {self.method!r}: "
                f"{len(unlike)} have no counterpart ({', '.join(unlike[:4])})",
                remedy="Load the state into the method, the base model and the adapter sizes that it was trained with",
            )
        for name, parameter in own.items():
            if state[name].shape != parameter.shape:  # copy_ would broadcast
                raise CoaloraError(
                    f"The state's {name} has shape {tuple(state[name].shape)}, the model's {tuple(parameter.shape)}",
                    remedy="Use the adapter sizes that the state was trained with",
                )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])
        self.refresh()

    def adjustments(self, configuration: np.ndarray) -> Tensor | None:
        """U (N, r, r) of a configuration; None without theta, where all ranks are used."""
        if self.theta is None and self.used_ranks is None:
            return None
        chosen = torch.as_tensor(configuration, dtype=torch.int64, device=self.device)
        U = None if self.theta is None else self.theta(chosen)
        return U if self.used_ranks is None else cascaded(U, self.used_ranks[chosen])

    def switch(self, configuration: np.ndarray) -> None:
        """Quantize the base to `configuration` (N,) and adjust the adapter to it; gradients flow into theta.

        All `FULL_PRECISION` is the base as it was, with the plain shared adapter.
        """
        if (configuration == FULL_PRECISION).all():
            self.full_precision()
            return
        self.base.switch(configuration)
        chosen = [int(choice) for choice in configuration]
        experts, compensation = self.experts, self.compensation
        self.terms.set(
            self.adjustments(configuration),
            None if experts is None else [experts(index, k) for index, k in enumerate(chosen)],
            None if compensation is None else [compensation(index, k) for index, k in enumerate(chosen)],
        )

    @torch.no_grad()
    def start_from_compensation(self, configuration: np.ndarray) -> None:
        """Start the shared pair from the decomposition of `configuration` (N,)'s quantization error.

        LQ-LoRA (arXiv 2311.12023, section 3) alternates quantization and decomposition; here the base stays
        q(W, c), as for every other method, and the decomposition is made once.
        """
        known = _known(self._known_statistics)
        for index, (choice, lora_A, lora_B) in enumerate(zip(configuration, self.lora_A, self.lora_B, strict=True)):
            A, B = compensation(self.base.residual(index, int(choice)), known[index], lora_A.weight.shape[0])
            size = A.norm(dim=1).clamp_min(1e-12).sqrt()  # each factor takes the root of the term's size
            lora_A.weight.copy_(A / size[:, None])
            lora_B.weight.copy_(B * size / self.recipe.scale)

    @torch.no_grad()
    def refresh(self) -> None:
        """Recompute U of the configuration held now, after theta has changed; frees what its gradient needed."""
        if not (self.base.configuration == FULL_PRECISION).all():
            self.switch(self.base.configuration)

    @contextmanager
    def in_full_precision(self, *, adapter: bool) -> Iterator[PeftModel]:
        """Within: the base in full precision with the plain shared adapter, or without any, in eval mode.

        Afterwards the model is as it was before, or in full precision where `QuantizedBase.in_full_precision` leaves
        it so: switch it.
        """
        training, terms = self.peft_model.training, self.terms.of_configuration()
        with self.base.in_full_precision():
            self.terms.set()
            self.peft_model.eval()
            try:
                with nullcontext() if adapter else self.peft_model.disable_adapter():
                    yield self.peft_model
            finally:
                self.peft_model.train(training)
                if not adapter and not METHODS[self.method].has_lora:
                    self._drop_lora()
        if not (self.base.configuration == FULL_PRECISION).all():
            self.terms.set(*terms)

    def full_precision(self) -> None:
        """The base without quantization and the plain shared adapter."""
        self.base.restore()
        self.terms.set()


def _known(statistics: Sequence[InputStatistics] | None) -> Sequence[InputStatistics]:
    if statistics is None:
        raise CoaloraError(
            "The compensation has no statistics of the layers' inputs to weigh errors by",
            remedy="Give the statistics that calibration collected",
        )
    return statistics


def _plain(name: str) -> str:
    """PEFT's parameter name without the wrapper's prefix and the adapter's name."""
    name = name.removeprefix("base_model.model.")
    return name.replace(f".modules_to_save.{ADAPTER}.", ".").replace(f".{ADAPTER}.", ".")
