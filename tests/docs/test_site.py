"""The site of `make docs`: it builds without a warning, fetches nothing, and its references have everything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import coalora

ROOT = Path(__file__).parents[2]
TOOLS = ROOT / ".venv" / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The built site; --strict refuses pages outside of the navigation, dead links, and docstrings that do not fit."""
    if not (TOOLS / "mkdocs").is_dir():
        pytest.skip("mkdocs is not installed: `make docs` puts it into .venv/docs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "--quiet", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(TOOLS), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class _Resources(HTMLParser):
    """Addresses that a browser fetches to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        names = {"link": ("href",), "form": ("action",)}.get(tag, ("src", "srcset", "poster", "data"))
        self.found += [value for name in names if (value := given.get(name))]


def test_reading_fetches_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        resources = _Resources()
        resources.feed(page.read_text(encoding="utf-8"))
        assert resources.found
        assert not [address for address in resources.found if re.match(r"(\w+:)?//", address)], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()[\"']?(\w+:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_python_api_has_every_public_name(site: Path) -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in (site / "api").glob("*.html"))
    assert [name for name in coalora.__all__ if f'id="coalora.{name}"' not in pages] == []


def test_no_section_of_a_docstring_is_left_as_plain_text(site: Path) -> None:
    for page in (site / "api").glob("*.html"):
        raw = re.findall(r"<p>[^<]*\b(?:Args|Attributes|Returns|Raises|Examples?):", page.read_text(encoding="utf-8"))
        assert raw == [], page


def test_references_have_commands_and_settings_of_the_code(site: Path) -> None:
    commands, settings = ((site / f"{name}.html").read_text(encoding="utf-8") for name in ("commands", "settings"))
    for name in ("adapt", "verify", "run", "prune", "stack-up"):
        assert f'id="coalora-{name}"' in commands
    assert "--size 1.2GB" in commands
    for key in ("goal", "model.pretrain.hidden_size", "training.objective.distillation", "stages.retries"):
        assert f"<code>{key}</code>" in settings
    assert "[at least 1, at most 4096]" in settings


def test_no_mark_of_what_pages_are_made_from_is_left(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not re.search(r"repository:|part of README", page.read_text(encoding="utf-8")), page
