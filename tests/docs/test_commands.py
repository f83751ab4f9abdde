"""Commands in README.md and docs/: each is one that the command line takes, with options that it has."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from coalora.cli import command_line

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def typed(page: Path) -> list[str]:
    """Lines of code blocks that call `coalora`; forms with [choices] or a|b are for reading, not for typing."""
    found = []
    for block in re.findall(r"^ *```\w*\n(.*?)^ *```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for line in re.sub(r"\\\n +", "", block).splitlines():
            command = line.partition("coalora ")[2] if re.match(r" *(\w+=\S+ )?coalora ", line) else ""
            if command and not re.search(r"\[-|\||\.\.\.", command):
                found.append(re.split(r" {2,}#|;", command)[0])
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if typed(page)], ids=lambda page: page.name)
def test_documented_commands_are_those_of_the_command_line(page: Path) -> None:
    for line in typed(page):
        command, words = typer.main.get_command(command_line()), shlex.split(line)
        while hasattr(command, "commands"):
            assert words[0] in command.commands, line
            command, words = command.commands[words[0]], words[1:]
        command.make_context("coalora", words)  # refuses what is unknown or missing; runs nothing


def test_readme_and_tutorial_have_commands() -> None:
    assert len(typed(ROOT / "README.md")) > 10
