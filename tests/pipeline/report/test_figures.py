"""front, curves, rounds and heatmap: what is drawn is what was measured."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pipeline.report.curves import curves_figure, grouped
from pipeline.report.front import front_figure, non_dominated
from pipeline.report.heatmap import block_runs, heatmap_figure
from pipeline.report.rounds import rounds_figure
from pipeline.report.schema import Step, as_result


def texts(figure: Figure) -> str:
    own = [text.get_text() for text in figure.texts]
    return "\n".join(own + [text.get_text() for ax in figure.axes for text in ax.texts])


def test_front_figure_joins_the_budgets_of_every_arm(result: dict[str, Any]) -> None:
    figure = front_figure(as_result(result))
    lines = [np.atleast_1d(np.asarray(line.get_ydata(), dtype=float)) for line in figure.axes[0].lines]
    drawn = [line for line in lines if len(line) == 6]
    expected = [[b["metric"][arm] for b in result["budgets"]] for arm in ("none", "shared", "coa")]
    np.testing.assert_allclose(drawn, expected)
    for label in ("no adapter", "Shared-LoRA", "CoA-LoRA", "full precision 1.929", "CoA-LoRA  0.667"):
        assert label in texts(figure)
    assert "lower is better" in figure.axes[0].get_ylabel()


def test_front_figure_says_what_is_off_the_scale(result: dict[str, Any]) -> None:
    assert "off the scale" not in texts(front_figure(as_result(result)))
    result["members"][0]["metric"]["none"] = 14.25
    assert "no adapter: 1 point off the scale, to 14.250" in texts(front_figure(as_result(result)))


def test_adapter_arms_never_leave_the_scale(result: dict[str, Any]) -> None:
    result["members"][0]["metric"]["coa"] = 9.0
    low, high = front_figure(as_result(result)).axes[0].get_ylim()
    assert low < 1.929
    assert high > 9.0


def test_non_dominated_matches_the_definition() -> None:
    rng = np.random.default_rng(3)
    points = [(float(a), float(b)) for a, b in rng.integers(0, 12, (60, 2))]
    brute = {
        p for p in points if not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)
    }  # fmt: skip
    front = non_dominated(points)
    assert set(front) == brute
    assert [bits for _, bits in front] == sorted(bits for _, bits in front)


def test_curves_are_grouped_means_and_lose_no_step() -> None:
    steps = [Step(step=i, loss=float(i % 4), lr=0.1, round=0) for i in range(42)]
    x, mean, low, high = grouped(steps, 4)
    assert x[:2] == [1.5, 5.5]
    assert mean[:2] == [1.5, 1.5]
    assert low[0] < mean[0] < high[0]
    tail = grouped(steps[:41], 4)
    assert len(tail[0]) == 10
    assert tail[0][-1] == np.mean(range(36, 41))


def test_curves_figure_names_arms_and_rounds(result: dict[str, Any]) -> None:
    shown = texts(curves_figure(as_result(result)))
    for word in ("CoA-LoRA", "Shared-LoRA", "round 3"):
        assert word in shown
    assert "no adapter" not in shown


def test_rounds_figure_shows_a_round_that_made_things_worse(result: dict[str, Any]) -> None:
    result["rounds"][1].update(hypervolume_before=0.6, hypervolume_after=0.58)
    assert "\u22120.020\n7/16" in texts(rounds_figure(as_result(result)))


def test_pictures_without_data_say_so(result: dict[str, Any]) -> None:
    result.update(rounds=[], curves={})
    assert "no search rounds" in texts(rounds_figure(as_result(result)))
    assert "no training curves" in texts(curves_figure(as_result(result)))


def test_heatmap_prints_every_value_in_its_row(result: dict[str, Any]) -> None:
    ax = heatmap_figure(as_result(result)).axes[0]
    cells = {
        (int(text.get_position()[1]), text.get_position()[0]): text.get_text()
        for text in ax.texts
        if text.get_text().isdigit()
    }
    printed = [[cells[key] for key in sorted(cells) if key[0] == row] for row in range(6)]
    assert printed == [[f"{bits:g}" for bits in row] for row in result["heatmap"]["bits"]]
    assert len(ax.patches) == 6 * 28


def test_blocks_are_found_in_names_of_decoders_and_encoders() -> None:
    names = ["embed.proj", "model.layers.0.q", "model.layers.0.k", "model.layers.11.q", "head"]
    assert block_runs(names) == [(None, [0]), (0, [1, 2]), (11, [3]), (None, [4])]
    assert block_runs(["roberta.encoder.layer.3.attention.self.query"])[0][0] == 3
    assert block_runs(["fc1", "fc2"]) == [(None, [0, 1])]


def test_the_legend_of_bits_writes_no_value_twice(result: dict[str, Any]) -> None:
    heat = result["heatmap"]
    # As counted: layers of one choice differ by the bytes of an offset.
    heat["bits"] = [[bits + 1e-4 * column for column, bits in enumerate(row)] for row in heat["bits"]]
    written = [text.get_text() for text in heatmap_figure(as_result(result)).texts]
    assert {"2", "3"} <= set(written)
    assert len(set(written)) == len(written)
