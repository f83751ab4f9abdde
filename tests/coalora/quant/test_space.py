"""Choice spaces: restriction, indexing, neighbours and byte tables."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from coalora.errors import CoaloraError
from coalora.quant.nf.scheme import NFChoice
from coalora.quant.space import ChoiceSpace


@pytest.fixture(scope="module")
def small() -> ChoiceSpace:
    return ChoiceSpace("nf", bits=[4, 2, 3], scale_dtype=["bf16"], scale_bits=[4, 8], scale_block_size=[64])


@pytest.fixture(scope="module")
def full() -> ChoiceSpace:
    return ChoiceSpace("nf")


def test_the_whole_scheme_is_432_choices_in_five_fields(full: ChoiceSpace) -> None:
    assert len(full) == 432
    assert full.field_sizes == (4, 4, 3, 3, 3)
    assert len(np.unique(full.fields, axis=0)) == 432
    assert full.bits_range() == (2 + 2 / 64 + 16 / (64 * 256), 8 + 8 / 16 + 32 / (16 * 16))


def test_restricted_fields_keep_the_order_of_the_scheme(small: ChoiceSpace) -> None:
    assert small.field_values["bits"] == (2, 3, 4)
    assert small.field_sizes == (3, 2, 1, 3, 1)
    assert len(small) == 18
    for k, row in enumerate(small.fields):
        values = {name: v[i] for (name, v), i in zip(small.field_values.items(), row, strict=True)}
        assert values == small.choice_dict(k)


def test_index_inverts_choices_and_dictionaries(small: ChoiceSpace) -> None:
    for k, choice in enumerate(small.choices):
        assert small.index(choice) == small.index(json.loads(json.dumps(small.choice_dict(k)))) == k


def test_describe_names_all_fields(small: ChoiceSpace) -> None:
    assert small.describe(small.index(NFChoice(3, 4, "bf16", 32, 64))) == "nf3 b32 s4/bf16 x64"


@pytest.mark.parametrize(
    "choice",
    [
        NFChoice(8, 4, "bf16", 32, 64),
        {"bits": 3},
        {"bits": 3, "scale_bits": 4, "scale_dtype": "bf16", "block_size": 32, "scale_block_size": 64, "x": 1},
    ],
)
def test_choices_outside_the_space_have_no_index(small: ChoiceSpace, choice: object) -> None:
    with pytest.raises(CoaloraError, match="is no choice of this space"):
        small.index(choice)  # type: ignore[arg-type]


@pytest.mark.parametrize("delta", [1, 2])
def test_neighbours_are_exactly_the_choices_one_field_away(small: ChoiceSpace, delta: int) -> None:
    table = small.neighbours(delta)
    steps = np.abs(small.fields[:, None] - small.fields[None])
    expected = (np.count_nonzero(steps, axis=2) == 1) & (steps.max(axis=2) <= delta)
    found = np.zeros_like(expected)
    for k, row in enumerate(table):
        near = row[row >= 0]
        assert len(set(near.tolist())) == len(near)
        assert (row[len(near) :] == -1).all()
        found[k, near] = True
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(found, found.T)
    assert table.dtype == np.int64


def test_a_single_choice_has_no_neighbours() -> None:
    one = ChoiceSpace("nf", bits=[4], scale_bits=[4], scale_dtype=["bf16"], block_size=[32], scale_block_size=[64])
    assert one.neighbours().shape == (1, 0)


def test_neighbours_need_a_step(small: ChoiceSpace) -> None:
    with pytest.raises(CoaloraError, match="delta of at least 1"):
        small.neighbours(0)


def test_byte_table_holds_the_bytes_of_every_layer_and_choice(small: ChoiceSpace) -> None:
    shapes = [(64, 48), (7, 5), (64, 48)]
    table = small.packed_nbytes_table(shapes)
    assert table.shape == (3, len(small))
    assert table.dtype == np.int64
    for layer, shape in enumerate(shapes):
        for k, choice in enumerate(small.choices):
            assert table[layer, k] == small.scheme.packed_nbytes(choice, shape)
    assert small.packed_nbytes_table([]).shape == (0, len(small))


def test_spaces_survive_json_and_copying_and_compare_by_content(small: ChoiceSpace, full: ChoiceSpace) -> None:
    assert ChoiceSpace.from_dict(json.loads(json.dumps(small.to_dict()))) == small != full
    assert copy.deepcopy(small) == small
    assert len({small, ChoiceSpace.from_dict(small.to_dict())}) == 1


def test_shared_arrays_are_read_only(small: ChoiceSpace) -> None:
    with pytest.raises(ValueError, match="read-only"):
        small.fields[0, 0] = 1


@pytest.mark.parametrize(
    ("allowed", "message"),
    [
        ({"bitz": [4]}, r"no field 'bitz'.*bits.*scale_bits"),
        ({"bits": [4, 5]}, r"no values \[5\].*\[2, 3, 4, 8\]"),
        ({"scale_dtype": "bf16"}, r"is no list"),
        ({"bits": 4}, r"is no list"),
        ({"bits": []}, r"at least one value"),
    ],
)
def test_bad_restrictions_say_what_is_accepted(allowed: dict, message: str) -> None:
    with pytest.raises(CoaloraError, match=message):
        ChoiceSpace("nf", **allowed)


def test_bad_dictionaries_and_indices_are_refused(small: ChoiceSpace) -> None:
    with pytest.raises(CoaloraError, match="read from `scheme` and `fields`"):
        ChoiceSpace.from_dict({"scheme": "nf", "bits": [4]})
    with pytest.raises(CoaloraError, match="no quantization scheme"):
        ChoiceSpace("int3")
    with pytest.raises(CoaloraError, match="There is no choice"):
        small.choice_dict(-1)


@pytest.fixture(scope="module")
def mixed() -> ChoiceSpace:
    nf = ChoiceSpace("nf", bits=[2, 4], scale_bits=[8], scale_dtype=["bf16"], block_size=[64], scale_block_size=[64])
    return ChoiceSpace.union([nf, ChoiceSpace("int", bits=[3, 4], group_size=[64]), ChoiceSpace("float")])


def test_a_union_joins_fields_of_one_name_and_marks_those_that_a_scheme_lacks(mixed: ChoiceSpace) -> None:
    assert mixed.field_values == {
        "scheme": ("nf", "int", "float"),
        "bits": (2, 3, 4, 16),
        "scale_bits": (8, "absent"),
        "scale_dtype": ("bf16", "absent"),
        "block_size": (64, "absent"),
        "scale_block_size": (64, "absent"),
        "group_size": (64, "absent"),
        "mode": ("sym", "asym", "absent"),
        "dtype": ("bf16", "fp16", "absent"),
    }
    assert [mixed.describe(k) for k in range(len(mixed))] == [
        "nf2 b64 s8/bf16 x64", "nf4 b64 s8/bf16 x64", "int3 g64 sym", "int3 g64 asym", "int4 g64 sym",
        "int4 g64 asym", "bf16", "fp16",
    ]  # fmt: skip
    assert len(np.unique(mixed.fields, axis=0)) == len(mixed) == 8
    assert (mixed.fields < mixed.field_sizes).all()
    assert [mixed.scheme_of(k).name for k in range(8)] == ["nf"] * 2 + ["int"] * 4 + ["float"] * 2
    for k, choice in enumerate(mixed.choices):
        assert mixed.nominal_bits[k] == mixed.scheme_of(k).nominal_bits(choice)


def test_choices_of_a_union_name_their_scheme_and_are_found_again(mixed: ChoiceSpace) -> None:
    for k, choice in enumerate(mixed.choices):
        fields = mixed.choice_dict(k)
        assert fields == {"scheme": mixed.scheme_of(k).name, **choice.as_dict()}
        assert mixed.index(json.loads(json.dumps(fields))) == mixed.index(choice) == k
    with pytest.raises(CoaloraError, match="is no choice of this space"):
        mixed.index(mixed.choices[2].as_dict())  # which scheme's?
    with pytest.raises(CoaloraError, match="with scheme_of"):
        _ = mixed.scheme
    assert mixed.scheme_name == "mixed"


def test_unions_survive_json_and_copying_and_a_union_of_one_scheme_is_that_scheme(mixed: ChoiceSpace) -> None:
    back = ChoiceSpace.from_dict(json.loads(json.dumps(mixed.to_dict())))
    assert back == mixed == copy.deepcopy(mixed)
    np.testing.assert_array_equal(back.fields, mixed.fields)
    one = ChoiceSpace.union([ChoiceSpace("int", bits=[2, 4]), ChoiceSpace("int", bits=[8, 4])])
    assert one == ChoiceSpace("int", bits=[2, 4, 8])
    assert one.to_dict() == ChoiceSpace("int", bits=[2, 4, 8]).to_dict()
    with pytest.raises(CoaloraError, match="no choice space to join"):
        ChoiceSpace.union([])


def test_many_results_of_a_union_are_those_of_its_schemes(mixed: ChoiceSpace) -> None:
    weight = torch.randn(6, 70, generator=torch.Generator().manual_seed(0))
    seen = {k: state for k, (state,) in mixed.quantize_layers([weight], [7, 0, 3], [None])}
    assert sorted(seen) == [0, 3, 7]
    for k, state in seen.items():
        alone = mixed.scheme_of(k).quantize(weight, mixed.choices[k])
        assert all(torch.equal(state[name], tensor) for name, tensor in alone.items())
    shapes = [(6, 70), (3, 64)]
    for row, shape in zip(mixed.packed_nbytes_table(shapes), shapes, strict=True):
        assert row.tolist() == [mixed.scheme_of(k).packed_nbytes(c, shape) for k, c in enumerate(mixed.choices)]


def test_a_climb_can_cross_between_schemes_at_the_nearest_bits(mixed: ChoiceSpace) -> None:
    table = mixed.neighbours()
    near = {mixed.describe(k): {mixed.describe(i) for i in row if i >= 0} for k, row in enumerate(table)}
    # 2.125 and 4.125 bits in nf; 3.25, 3.30, 4.25 and 4.31 bits in int.
    assert near["nf2 b64 s8/bf16 x64"] == {"nf4 b64 s8/bf16 x64", "int3 g64 sym", "bf16"}
    assert near["int4 g64 asym"] == {"int3 g64 asym", "int4 g64 sym", "nf4 b64 s8/bf16 x64", "bf16"}
    assert near["fp16"] == {"bf16", "nf4 b64 s8/bf16 x64", "int4 g64 asym"}
    reached, new = {0}, {0}
    while new:
        new = {int(i) for k in new for i in table[k] if i >= 0} - reached
        reached |= new
    assert len(reached) == len(mixed)


def test_steps_are_counted_among_the_values_that_a_layer_may_take(full: ChoiceSpace) -> None:
    bits = np.array([full.field_values["bits"][i] for i in full.fields[:, 0]])
    allowed = np.stack([np.isin(bits, [2, 8]), np.isin(bits, [2, 3, 4])])
    k = full.index(NFChoice(2, 4, "bf16", 32, 64))
    stepped = {bits[i] for i in full.neighbours(1, allowed)[k] if i >= 0}
    assert stepped == {2, 3, 8}  # 2 to 8 is one step for the first layer
    assert 8 not in {bits[i] for i in full.neighbours()[k] if i >= 0}
    np.testing.assert_array_equal(full.neighbours(2, np.ones((3, len(full)), dtype=bool)), full.neighbours(2))
