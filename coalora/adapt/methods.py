"""Registry of the methods that can be trained and compared: CoA-LoRA and its baselines.

All methods share one class (`coalora.adapt.adapted.AdaptedModel`), data, steps and sampling, so that a comparison
differs in nothing but what a `Method` describes. Other packages add methods in the entry point group
``coalora.methods``, or name one ``module:attribute``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from coalora.recipes import Sampling, TrainingRecipe
from coalora.registry import Registry


@dataclass(frozen=True)
class Method:
    """One method: its trained parts and the configurations that it sees.

    Attributes:
        label: its name in tables and pictures.
        over: ``sets``: one training over every configuration of the set; ``budget``: one for each asked budget's
            configuration alone.
        has_lora: whether there is a LoRA pair; without one the task head of a classifier is all that is trained, and
            nothing in a language model.
        theta: choices that theta adjusts the pair to: as the adapter's recipe says, all, or none.
        follows_choices: whether the recipe's terms for low bit-widths (`coalora.adapt.experts`) and its closed-form
            compensation take part in the rank.
        start: of the pair: PEFT's initial values (B = 0), or the decomposition of the error of the one configuration
            that the method is trained for.
        sampling: draw of the configurations in place of the training recipe's.
        paired: whether a step trains two configurations, in place of the training recipe's word.

    Example:
        >>> from coalora import METHODS
        >>> METHODS["shared"].label, METHODS["coa"].theta
        ('Shared-LoRA', 'recipe')
    """

    label: str
    over: Literal["sets", "budget"] = "sets"
    has_lora: bool = True
    theta: Literal["recipe", "all", "none"] = "none"
    follows_choices: bool = False
    start: Literal["peft", "compensation"] = "peft"
    sampling: Sampling | None = None
    paired: bool | None = None

    def drawing(self, recipe: TrainingRecipe) -> TrainingRecipe:
        """A training recipe with the method's own draws, whatever it says itself."""
        sampling = self.sampling or recipe.sampling
        paired = recipe.paired if self.paired is None else self.paired
        return replace(recipe, sampling=sampling, paired=False if sampling == "adaptive" else paired)


# In the order in which tables and pictures have them.
METHODS: Registry[Method] = Registry(
    "method",
    "coalora.methods",
    "coalora.adapt.methods:Method",
    {
        "none": Method("no adapter", has_lora=False),
        "shared": Method("Shared-LoRA"),
        # CoA-LoRA, arXiv 2509.25214: theta at the full rank, uniform draws, one a step.
        "paper": Method("CoA-LoRA as in the paper", theta="all", sampling="uniform", paired=False),
        "coa": Method("CoA-LoRA", theta="recipe", follows_choices=True),
        "qlora": Method("one LoRA per budget", over="budget"),  # QLoRA, arXiv 2305.14314
        "lq-lora": Method("one LQ-LoRA per budget", over="budget", start="compensation"),  # arXiv 2311.12023
    },
)
