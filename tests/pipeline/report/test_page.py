from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pipeline.report.page import render_page, write_report
from pipeline.report.schema import as_result
from tests.pipeline.report.conftest import make_result


class Page(HTMLParser):
    """All tags with their attributes, and the page's text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def small_page() -> str:
    """The page of `small_result`."""
    return render_page(as_result(make_result(n_blocks=1, n_budgets=2, n_members=4)))


def test_same_result_gives_the_same_bytes(small_result: dict[str, Any], tmp_path: Path) -> None:
    first, second = tmp_path / "a" / "b", tmp_path / "c"
    for folder in (first, second):
        write_report(as_result(small_result), folder)
    assert sorted(path.name for path in second.iterdir()) == ["curves.png", "front.png", "report.html"]
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()
    assert (first / "front.png").read_bytes().startswith(b"\x89PNG")
    small_result["budgets"][0]["metric"]["coa"] += 0.01
    assert render_page(as_result(small_result)) != (first / "report.html").read_text(encoding="utf-8")


def test_page_refers_to_nothing_outside_itself(small_result: dict[str, Any]) -> None:
    small_result["notes"].append("see https://example.org/paper")  # plain text is fine
    html = render_page(as_result(small_result))
    page = Page(html)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for tag, attrs in page.tags:
        assert tag not in {"link", "img", "iframe", "image", "object"}
        for key, value in attrs.items():
            if key in {"src", "href", "xlink:href"}:
                assert value is not None
                assert value.startswith("#")
                assert value[1:] in ids
    for target in re.findall(r"url\(([^)]*)\)", html):
        assert target[1:] in ids
    assert "@import" not in html
    assert html.count("http://") == html.count('xmlns="http://') + html.count('xmlns:xlink="http://')
    assert html.count("https://") == 1


def test_colours_of_pictures_follow_the_theme(small_page: str) -> None:
    html = small_page
    svg = html[html.index("<svg") :]
    assert "var(--coa)" in svg
    assert not re.search(r"(fill|stroke): #(0b6cb0|c8590c|1c2530|ffffff)", svg)
    assert "prefers-color-scheme: dark" in html


EVIL = "--></title></text><script>alert('$x$ & \"q\"')</script><img src=x onerror=1>"


def test_user_strings_are_escaped_everywhere(small_result: dict[str, Any], small_page: str) -> None:
    clean = Page(small_page)
    small_result["pipeline"] = small_result["model"]["name"] = small_result["benchmark"]["name"] = EVIL
    small_result["benchmark"]["metric"] = EVIL
    small_result["arms"]["coa"]["label"] = small_result["notes"][0] = EVIL
    small_result["heatmap"]["layers"][0] = small_result["heatmap"]["kinds"][0] = EVIL
    small_result["exports"][0]["folder"] = small_result["hypervolume"]["normalization"] = EVIL
    small_result["settings"] = {EVIL: EVIL}
    small_result["seconds"] = {EVIL: 1.0, **small_result["seconds"]}
    html = render_page(as_result(small_result))
    page = Page(html)
    assert sum(tag == "script" for tag, _ in page.tags) == sum(tag == "script" for tag, _ in clean.tags) == 1
    assert not any(tag == "img" or "onerror" in attrs for tag, attrs in page.tags)
    assert "alert('$x$" in page.text


def test_best_arm_is_marked_whichever_it_is(accuracy_result: dict[str, Any]) -> None:
    accuracy_result["rounds"], accuracy_result["curves"] = [], {}
    for budget in accuracy_result["budgets"]:
        budget["metric"] = {"none": 0.5, "shared": 0.9, "coa": 0.8}
    html = render_page(as_result(accuracy_result))
    marked = re.findall(r'class="best" style="--mark: var\(--(\w+)\)">([\d.]+)<', html)
    assert marked == [("shared", "0.900")] * 6
    assert "\u22120.100" in html


def test_points_carry_their_numbers_as_tooltips(small_result: dict[str, Any], small_page: str) -> None:
    value = small_result["budgets"][0]["metric"]["coa"]
    assert f"<title>CoA-LoRA: {value:.3f} at 2.22 bits (budget 2.25)</title>" in small_page


def _single(result: dict[str, Any]) -> None:
    result["budgets"], result["members"] = result["budgets"][:1], result["members"][:1]
    result["heatmap"]["budgets"], result["heatmap"]["bits"] = [2.25], result["heatmap"]["bits"][:1]
    result["exports"], result["notes"], result["seconds"], result["settings"] = [], [], {}, {}
    result["curves"] = {"coa": result["curves"]["coa"][:1]}


def _without_none(result: dict[str, Any]) -> None:
    for values in [result["arms"], result["hypervolume"]["values"]]:
        del values["none"]
    for part in [*result["budgets"], *result["members"]]:
        del part["metric"]["none"], part["loss"]["none"]


def _only_none(result: dict[str, Any]) -> None:
    for values in [result["arms"], result["hypervolume"]["values"]]:
        del values["shared"], values["coa"]
    for part in [*result["budgets"], *result["members"]]:
        for field in ("metric", "loss"):
            part[field] = {"none": part[field]["none"]}
    result["curves"] = {}


def _no_rounds(result: dict[str, Any]) -> None:
    result["rounds"] = []


def _empty_fronts(result: dict[str, Any]) -> None:
    for at in result["rounds"]:
        at["front"] = []


def _constant(result: dict[str, Any]) -> None:
    for part in [*result["budgets"], *result["members"]]:
        part["metric"] = dict.fromkeys(part["metric"], 0.0)
        part["loss"] = dict.fromkeys(part["loss"], 0.0)
    for steps in result["curves"].values():
        for at in steps:
            at["lr"] = 0.0


@pytest.mark.parametrize("change", [_single, _without_none, _only_none, _no_rounds, _empty_fronts, _constant])
def test_unusual_runs_render_without_warnings(
    small_result: dict[str, Any], change: Any, recwarn: pytest.WarningsRecorder
) -> None:
    change(small_result)
    page = render_page(as_result(small_result))
    assert ("Pareto search" in page) == bool(small_result["rounds"])
    assert ("no adapter" in page) == ("none" in small_result["arms"])
    assert [str(warning.message) for warning in recwarn] == []
