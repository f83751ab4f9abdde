from __future__ import annotations

import re

import numpy as np
import pytest

from pipeline.report.style import PALETTE, arm_look, bits_color, limits, spread, text_on


def test_spread_keeps_order_gap_and_bounds() -> None:
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 9):
        wanted = rng.uniform(0, 1, n).tolist()
        placed = spread(wanted, 0.1, 0.0, 1.0)
        order = np.argsort(wanted)
        assert np.all(np.diff(np.array(placed)[order]) >= 0.1 - 1e-9)
        assert min(placed) >= 0
        assert max(placed) <= 1 + 1e-9


def test_spread_leaves_labels_that_do_not_collide_where_they_are() -> None:
    assert spread([0.9, 0.1, 0.5], 0.1, 0, 1) == pytest.approx([0.9, 0.1, 0.5])
    assert spread([0.5, 0.5], 0.2, 0, 1) == pytest.approx([0.4, 0.6])


def test_spread_shrinks_the_gap_when_there_is_no_room() -> None:
    assert sorted(spread([0.5] * 5, 0.5, 0, 1)) == pytest.approx([0, 0.25, 0.5, 0.75, 1])


def test_one_catastrophic_arm_does_not_flatten_the_others() -> None:
    low, high = limits([2.0, 2.2], [2.1, 14.0])
    assert low < 2.0
    assert 2.2 < high < 4
    low, high = limits([2.0, 2.2], [2.5])
    assert high > 2.5


def test_palette_colours_are_unique_so_that_themes_can_replace_them() -> None:
    lights = [light for light, _ in PALETTE.values()]
    assert len(set(lights)) == len(lights)
    assert all(re.fullmatch(r"#[0-9a-f]{6}", light) for light in lights)
    heat = {bits_color(bits) for bits in (2, 2.5, 3, 4, 5, 6, 8)}
    assert not (heat | {text_on(color) for color in heat}) & set(lights)


def test_arms_differ_in_colour_and_in_marker() -> None:
    names = ["none", "shared", "coa", "qlora", "lq-lora", "eora"]
    looks = [arm_look(name, names) for name in names]
    assert len({color for color, _ in looks}) == len({marker for _, marker in looks}) == 6


def _luminance(color: str) -> float:
    rgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return float(linear @ np.array([0.2126, 0.7152, 0.0722]))


def _contrast(a: str, b: str) -> float:
    low, high = sorted([_luminance(a), _luminance(b)])
    return (high + 0.05) / (low + 0.05)


def test_colours_contrast_with_their_background_in_both_modes() -> None:
    for mode in (0, 1):
        surface = PALETTE["surface"][mode]
        assert _contrast(PALETTE["ink"][mode], surface) > 10
        for name in set(PALETTE) - {"surface", "ink", "grid"}:
            assert _contrast(PALETTE[name][mode], surface) >= (3 if name != "muted" else 4.5), (name, mode)
    for bits in np.linspace(2, 8, 25):
        assert _contrast(text_on(bits_color(bits)), bits_color(bits)) >= 4.5
