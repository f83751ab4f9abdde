"""Configuration sets: order, JSON form, and what they may be read with."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from coalora.calibrate.tables import CalibrationTables
from coalora.configurations import ConfigurationSet, configuration_dict, configuration_digest, configuration_of
from coalora.errors import CoaloraError


@pytest.fixture(scope="module")
def tables(tiny_llama, tables_for) -> CalibrationTables:
    return tables_for(tiny_llama())


@pytest.fixture
def members(tables: CalibrationTables, random_configurations) -> ConfigurationSet:
    configurations = random_configurations(tables, 6)
    return ConfigurationSet(configurations, np.array([3.0, np.nan, 1.0, 2.5, 0.5, 4.0]), np.arange(6))


def test_sorting_goes_by_bytes_and_keeps_members_whole(members: ConfigurationSet, tables: CalibrationTables) -> None:
    ordered = members.sorted(tables)
    assert np.all(np.diff(tables.total_nbytes(ordered.configurations)) >= 0)
    whole = {
        (tuple(c), str(x), j) for c, x, j in zip(members.configurations, members.losses, members.joined, strict=True)
    }
    assert whole == {
        (tuple(c), str(x), j) for c, x, j in zip(ordered.configurations, ordered.losses, ordered.joined, strict=True)
    }


def test_ties_in_bytes_go_to_the_lower_loss_then_unmeasured_last_then_lexicographic(tables: CalibrationTables) -> None:
    # Layers of one shape cost the same whichever of them has the 8-bit choice.
    same = [i for i, layer in enumerate(tables.layers) if layer.shape == tables.layers[0].shape][:4]
    rows = np.zeros((4, len(tables.layers)), dtype=np.int64)
    rows[np.arange(4), same] = 7
    given = ConfigurationSet(rows, np.array([np.nan, 2.0, 1.0, 2.0]), np.arange(4))
    assert len(set(tables.total_nbytes(rows).tolist())) == 1
    # Members 1 and 3 tie: the one whose first differing layer has the smaller index comes first.
    assert given.sorted(tables).joined.tolist() == [2, 3, 1, 0]


def test_sorting_does_not_depend_on_the_order_given(members: ConfigurationSet, tables: CalibrationTables) -> None:
    shuffled = members.take(np.array([4, 2, 0, 5, 1, 3]))
    assert shuffled.sorted(tables).to_dict(tables) == members.sorted(tables).to_dict(tables)


def test_merge_appends_and_objectives_are_loss_and_average_bits(
    members: ConfigurationSet, tables: CalibrationTables
) -> None:
    both = members.merge(members.take(np.array([2])))
    assert len(both) == 7
    Y = both.objectives(tables)
    assert Y.shape == (7, 2)
    assert Y[6].tolist() == Y[2].tolist() == [1.0, float(tables.average_bits(members.configurations[2]))]


def test_json_round_trip_is_exact_and_unmeasured_losses_stay_unmeasured(
    members: ConfigurationSet, tables: CalibrationTables
) -> None:
    content = json.loads(json.dumps(members.to_dict(tables), allow_nan=False))
    back = ConfigurationSet.from_dict(content, tables)
    np.testing.assert_array_equal(back.configurations, members.configurations)
    np.testing.assert_array_equal(back.losses, members.losses)
    np.testing.assert_array_equal(back.joined, members.joined)
    assert back.configurations.dtype == np.int64


def test_json_names_every_choice_by_its_fields(members: ConfigurationSet, tables: CalibrationTables) -> None:
    content = members.to_dict(tables)
    for member, row in zip(content["members"], members.configurations, strict=True):
        assert [content["choices"][k] for k in member["choices"]] == [tables.space.choice_dict(int(k)) for k in row]


def test_an_empty_set_round_trips(members: ConfigurationSet, tables: CalibrationTables) -> None:
    empty = members.take(np.array([], dtype=np.int64))
    back = ConfigurationSet.from_dict(empty.to_dict(tables), tables)
    assert back.configurations.shape == (0, len(tables.layers))


def test_a_set_of_other_layers_is_refused(
    members: ConfigurationSet, tables: CalibrationTables, tiny_gpt2, tables_for
) -> None:
    with pytest.raises(CoaloraError, match=r"made for scheme nf and 14 layers, and not for nf and these 8 layers"):
        ConfigurationSet.from_dict(members.to_dict(tables), tables_for(tiny_gpt2()))


def test_a_set_of_another_base_is_refused_with_both_digests(
    members: ConfigurationSet, tables: CalibrationTables
) -> None:
    other = dataclasses.replace(tables, base_digest="1" * 64)
    with pytest.raises(CoaloraError, match=f"for the base model {'0' * 64}, and not for {'1' * 64}"):
        ConfigurationSet.from_dict(members.to_dict(tables), other)


def test_a_file_that_is_no_set_is_refused(tables: CalibrationTables) -> None:
    with pytest.raises(CoaloraError, match="format None is not that of a configuration set"):
        ConfigurationSet.from_dict({"members": []}, tables)


@pytest.mark.parametrize("edit", [lambda c: c[:-1], lambda c: [-1, *c[1:]], lambda c: [99, *c[1:]]])
def test_a_member_that_was_edited_out_of_range_is_refused(
    members: ConfigurationSet, tables: CalibrationTables, edit
) -> None:
    content = members.to_dict(tables)
    content["members"][3]["choices"] = edit(content["members"][3]["choices"])
    with pytest.raises(CoaloraError, match="Member 3"):
        ConfigurationSet.from_dict(content, tables)


def test_a_choice_outside_the_space_is_refused(members: ConfigurationSet, tables: CalibrationTables) -> None:
    content = members.to_dict(tables)
    content["choices"][0]["block_size"] = 32
    with pytest.raises(CoaloraError, match="is no choice of this space"):
        ConfigurationSet.from_dict(content, tables)


@pytest.mark.parametrize("choice", [{"bits": 4}, {"bits": [4]}, "nf4", None])
def test_a_configuration_with_a_choice_outside_the_space_names_the_layer_and_the_nearest(
    tables: CalibrationTables, choice: object
) -> None:
    content = configuration_dict(np.zeros(len(tables.layers), dtype=np.int64), tables)
    name = tables.layers[1].name
    own = content["layers"][name]
    content["layers"][name] = {**own, **choice} | {"block_size": 1000} if isinstance(choice, dict) else choice
    with pytest.raises(CoaloraError) as caught:
        configuration_of(content, tables)
    assert f"gives {name} " in str(caught.value)
    wider = {"block_size": 64} if isinstance(choice, dict) else {}
    nearest = own | wider | ({"bits": 4} if choice == {"bits": 4} else {})
    assert f"the nearest, {nearest}" in str(caught.value)


def test_one_configuration_lists_every_layers_choice(tables: CalibrationTables) -> None:
    configuration = np.arange(len(tables.layers)) % len(tables.space)
    content = configuration_dict(configuration, tables)
    assert list(content["layers"]) == [layer.name for layer in tables.layers]
    assert [tables.space.index(choice) for choice in content["layers"].values()] == configuration.tolist()
    with pytest.raises(CoaloraError, match="does not fit 14 target layers"):
        configuration_dict(configuration[:-1], tables)


def test_the_digest_changes_with_base_scheme_and_any_layer_and_with_nothing_else(tables: CalibrationTables) -> None:
    content = configuration_dict(np.zeros(len(tables.layers), dtype=np.int64), tables)
    own = configuration_digest(content)
    assert own == configuration_digest({**content, "average_bits": 2.5})
    changed = np.zeros(len(tables.layers), dtype=np.int64)
    changed[-1] = 1
    others = [
        configuration_dict(changed, tables),
        {**content, "base_digest": "1" * 64},
        {**content, "scheme": "int"},
    ]
    assert len({own, *map(configuration_digest, others)}) == 4
