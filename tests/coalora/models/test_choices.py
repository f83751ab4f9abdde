"""Which choices each layer has: rules in order, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest

from coalora.errors import CoaloraError
from coalora.models.choices import Part, Rule, layer_choices
from coalora.models.targets import TargetLayer
from coalora.quant.space import ChoiceSpace

LAYERS = [
    TargetLayer(f"model.layers.{block}.{kind}", kind, block, (8, 64), False)
    for block in range(2)
    for kind in ("self_attn.q_proj", "mlp.up_proj")
] + [TargetLayer("lm_head", "lm_head", 0, (8, 64), False)]
NF = Part("nf", {"scale_bits": [8], "scale_dtype": ["bf16"], "block_size": [64], "scale_block_size": [64]})
INT = Part("int", {"group_size": [64], "mode": ["sym"]})


def found(*rules: Rule, parts: tuple[Part, ...] = (NF,)) -> list[list[str]]:
    """What every layer may take."""
    space, allowed = layer_choices(LAYERS, parts, rules)
    assert allowed.any(0).all()
    assert allowed.any(1).all()
    return [[space.describe(int(k)).split(" ")[0] for k in np.flatnonzero(row)] for row in allowed]


def refused(*rules: Rule, parts: tuple[Part, ...] = (NF,)) -> str:
    with pytest.raises(CoaloraError) as caught:
        layer_choices(LAYERS, parts, rules)
    return str(caught.value)


def test_without_rules_every_layer_takes_every_choice_of_the_scheme() -> None:
    space, allowed = layer_choices(LAYERS, [NF])
    assert space == ChoiceSpace("nf", **NF.allow)
    assert allowed.shape == (5, 4)
    assert allowed.all()


def test_a_rule_with_a_scheme_replaces_and_one_without_cuts() -> None:
    nf, ints = ["nf2", "nf3", "nf4", "nf8"], ["int4", "int8"]
    mlp = Rule("*.mlp.*", (Part("int", {**INT.allow, "bits": [4, 8]}),))
    head = Rule("lm_head", (Part("float", {"dtype": ["bf16"]}),))
    assert found(mlp, head) == [nf, ints, nf, ints, ["bf16"]]
    assert found(mlp, head, Rule("*", min_bits=8)) == [["nf8"], ["int8"], ["nf8"], ["int8"], ["bf16"]]
    assert found(Rule("q_proj", max_bits=3), Rule("model.layers.1.*", allow={"bits": [2, 8]})) == [
        ["nf2", "nf3"], nf, ["nf2"], ["nf2", "nf8"], nf
    ]  # fmt: skip
    # The last word counts.
    assert found(Rule("lm_head", min_bits=8), Rule("lm_head", (INT,))) == [nf] * 4 + [["int2", "int3", "int4", "int8"]]


def test_a_layer_may_choose_between_schemes_and_fields_cut_only_those_that_have_them() -> None:
    both = found(Rule("*", allow={"group_size": [64], "bits": [4, 8]}), parts=(NF, Part("int", {"mode": ["asym"]})))
    assert both == [["nf4", "nf8", "int4", "int8"]] * 5


def test_values_that_no_layer_may_take_are_no_part_of_the_space() -> None:
    space, allowed = layer_choices(LAYERS, [NF], [Rule("*", min_bits=4), Rule("lm_head", allow={"bits": [8]})])
    assert space.field_values["bits"] == (4, 8)
    assert allowed.tolist() == [[True, True]] * 4 + [[False, True]]


@pytest.mark.parametrize(
    ("rule", "fragments"),
    [
        (
            Rule("*.mpl.*", (INT,)),
            ["'*.mpl.*' matches no target layer", "layers.0.self_attn.q_proj", "choices.rules"],
        ),
        (Rule("lm_head", (Part("int5"),)), ["no quantization scheme", "int5", "float"]),
        (Rule("lm_head", (Part("int", {"block_size": [64]}),)), ["Scheme 'int' has no field", "group_size"]),
        (Rule("lm_head", (Part("int", {"bits": [5]}),)), ["Field 'bits' of scheme 'int'", "[5]"]),
        (Rule("lm_head", allow={"group_size": [64]}), ["group_size", "fields of nf: bits, scale_bits"]),
        (Rule("lm_head", allow={"bits": [4, 16]}), ["no bits [16]", "[2, 3, 4, 8]"]),
        (Rule("*.mlp.*", min_bits=9), ["model.layers.1.mlp.up_proj (2 in all)", "The rule for '*.mlp.*'"]),
        (Rule("q_proj", (INT,), max_bits=1), ["leaves model.layers.0.self_attn.q_proj"]),
    ],
)
def test_rules_that_cannot_be_followed_are_refused(rule: Rule, fragments: list[str]) -> None:
    text = refused(rule)
    for fragment in fragments:
        assert fragment in text


def test_rules_that_contradict_each_other_are_refused_at_the_one_that_leaves_nothing() -> None:
    text = refused(Rule("*", max_bits=4), Rule("lm_head", min_bits=8))
    assert "The rule for 'lm_head' leaves lm_head (1 in all) without a choice" in text
