"""The choice space that settings ask for, over a model's target layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from coalora.models.choices import Part, Rule, layer_choices
from coalora.models.targets import TargetLayer
from coalora.quant.space import ChoiceSpace
from pipeline.settings.sections import ChoiceSettings


def choices_of(choices: ChoiceSettings, layers: Sequence[TargetLayer]) -> tuple[ChoiceSpace, NDArray[np.bool_]]:
    """K choices, and which of them each of the N layers may take, bool (N, K).

    Raises:
        CoaloraError: what `layer_choices` refuses.
    """
    rules = []
    for rule in choices.rules:
        if rule.scheme is None:
            rules.append(Rule(rule.layers, (), rule.allow, rule.min_bits, rule.max_bits))
        else:
            parts = (Part(rule.scheme, rule.allow), *(Part(also.scheme, also.allow) for also in rule.also))
            rules.append(Rule(rule.layers, parts, {}, rule.min_bits, rule.max_bits))
    parts = (Part(choices.scheme, choices.allow), *(Part(also.scheme, also.allow) for also in choices.also))
    return layer_choices(layers, parts, rules)
