"""Commands end with 0, 1, 2 or 130, say what is wrong in one or two lines, and import nothing slow before they must."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

import coalora.cli
from coalora.cli import Command, command_line, main
from coalora.errors import CoaloraError
from tests.commands import refused

ROOT = Path(__file__).parents[2]
COMMANDS = (
    "run", "stage", "adapt", "score", "inspect", "compare", "verify", "push", "devices", "upload", "download",
    "restore", "prune", "stack", "limits", "dvc", "pool", "deployments",
)  # fmt: skip
SLOW = ("torch", "transformers", "peft", "bitsandbytes", "prefect", "mlflow", "dvc", "boto3", "scipy", "matplotlib")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the pipelines and nothing else."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "pipelines.yaml").write_bytes((ROOT / "pipelines.yaml").read_bytes())
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., object]], None]:
    """Puts one command in place of all."""

    def put(body: Callable[..., object]) -> None:
        def only() -> typer.Typer:
            app = typer.Typer(rich_markup_mode=None)
            app.callback()(lambda: None)
            app.command("probe", cls=Command)(body)
            return app

        monkeypatch.setattr(coalora.cli, "command_line", only)

    return put


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    lines = listed.split("Commands:")[1].strip().splitlines()
    assert {line.split()[0] for line in lines} == set(COMMANDS)
    assert not any(line.endswith("...") for line in lines)
    assert main([]) == 0
    assert capsys.readouterr().out == listed


@pytest.mark.parametrize("command", [*COMMANDS, "stack up", "stack down", "stack status"])
def test_each_command_explains_every_option(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"Usage: coalora {command} ")
    assert err == ""


def test_a_room_of_another_project_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "__init__.py").touch()
    (tmp_path / "flows" / "commands.py").write_text("raise AssertionError")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "flows", None)
    monkeypatch.delitem(sys.modules, "flows")
    names = {command.name for command in command_line().registered_commands}
    assert {"adapt", "inspect", "verify"} <= names
    assert "run" not in names


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (1, 1)])
def test_the_commands_own_code_is_the_exit_code(probe: Callable[..., None], result: int | None, code: int) -> None:
    probe(lambda: result)
    assert main(["probe"]) == code


def test_an_interruption_says_how_to_resume(probe: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    probe(interrupted)
    assert main(["probe"]) == 130
    assert "Run the same command again to resume" in capsys.readouterr().err


def test_bad_input_is_a_problem_and_a_remedy(probe: Callable[..., None]) -> None:
    def refuse() -> None:
        raise CoaloraError("budget -1 is not above 0", remedy="Ask for more")

    probe(refuse)
    assert refused("probe") == "error: budget -1 is not above 0. Ask for more."


def test_a_defect_is_not_dressed_up_as_bad_input(probe: Callable[..., None]) -> None:
    probe(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["probe"])


def test_options_take_several_values_and_may_be_repeated(probe: Callable[..., None]) -> None:
    seen: list[object] = []

    def body(
        name: str,
        changes: list[str] = typer.Option([], "--set"),  # noqa: B008 (typer's way)
        budgets: list[float] = typer.Option([], "--budget"),  # noqa: B008
        flag: bool = False,
    ) -> None:
        seen.append((name, changes, budgets, flag))

    probe(body)
    assert main(["probe", "demo", "--set", "a.b=1", "c=-2", "--budget", "2.5", "-3", "--flag", "--set", "d=3"]) == 0
    assert seen == [("demo", ["a.b=1", "c=-2", "d=3"], [2.5, -3.0], True)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rnu", "demo"], "No such command 'rnu'. Did you mean 'run'? See `coalora --help`."),
        (["run"], "Missing argument 'NAME'"),
        (["run", "demo", "--sett", "a=b"], "No such option"),
        (["adapt", "runs/demo", "--out", "x"], "No limit is given"),
        (["run", "demo", "--set", "search.round=3"], "did you mean 'rounds'?"),
        (["run", "dmo"], "sst2-minilm"),
        (["run", "demo", "--file", "x.yaml"], "x.yaml"),
        (["run", "tiny"], "versioning.enabled=false"),
        (["run", "tiny", "--refresh", "trane"], "No such stage: trane. Refresh some of"),
        (["stage", "trainng", "demo"], "A pipeline has no part 'trainng'. Choose from inputs, calibration"),
        (["stage", "export", "tiny", "--set", "evaluation.budgets=[1]"], "budget"),
        (["adapt", "runs/demo/latest", "--bits", "3.5", "--out", "adapted"], "does not exist. Name a run folder"),
        (["score", "runs/demo/latest", "--budget", "3.5", "--text", "a"], "runs/demo/latest is no run folder"),
        (["inspect", "pipelines.yaml"], "pipelines.yaml is none of the things"),
        (["verify", "nothing"], "nothing does not exist"),
        (["restore", "--rev", "HEAD", "--mlflow-run", "1", "--out", "x"], "two sources"),
        (["prune", "--withdraw", "demo/1"], "Give --at s3://"),
        (["prune", "--older-than", "-1"], "--older-than is -1. Give"),
        (["limits", "--gpus", "1", "--machine", "node1"], "node1 is no NAME=NUMBER"),
        (["stack", "up", "--ports", "s3=70000"], "s3=70000 is no NAME=NUMBER"),
        (["pool"], "No Prefect server is named"),
    ],
)
def test_a_command_with_bad_input_ends_with_2_and_creates_nothing(
    checkout: Path, arguments: list[str], words: str
) -> None:
    assert words in refused(*arguments)
    assert [p.name for p in checkout.iterdir()] == ["pipelines.yaml"]


def test_help_and_a_wrong_setting_import_nothing_slow(checkout: Path) -> None:
    program = f"""
import sys
from coalora.cli import main
assert main(["run", "--help"]) == 0
assert main(["run", "tiny", "--set", "search.rounds=two"]) == 2
print("imported:", [name for name in {SLOW!r} if name in sys.modules])
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("COALORA_", "PREFECT_", "MLFLOW_"))}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=checkout, env=environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "imported: []"
    assert done.stderr.startswith("error: ")
    assert "search.rounds" in done.stderr
    assert [p.name for p in checkout.iterdir()] == ["pipelines.yaml"]


def test_a_process_ends_with_the_exit_code(checkout: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "coalora", "run", "dmo"], cwd=checkout, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")


def test_what_a_strangers_folder_says_cannot_write_on_the_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run\x1b[2J"
    folder.mkdir()
    record = {"pipeline": "p\x1b]0;title\x07", "identity": "i\u202e", "settings": {}}
    (folder / "run.json").write_text(json.dumps(record))
    assert main(["inspect", str(folder)]) == 0
    assert main(["verify", str(folder)]) == 0
    assert main(["adapt", str(folder), "--bits", "3", "--out", str(folder)]) == 2
    told = "".join(capsys.readouterr())
    assert "p\\x1b]0;title\\x07" in told
    assert r"run\x1b[2J" in told
    assert not set("\x1b\x07\u202e") & set(told)
