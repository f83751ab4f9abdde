"""Commands end with 0, 2 or 130; bad input is a message on standard error, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from coalora.errors import CoaloraError
from flows import adapt, pipeline, stage
from flows.cli import parser, run_command

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the pipelines and nothing else."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    (folder / "pipelines.yaml").write_bytes((ROOT / "pipelines.yaml").read_bytes())
    monkeypatch.chdir(folder)
    return folder


def command(result: int | BaseException) -> Callable[[Sequence[str] | None], int]:
    def run(arguments: Sequence[str] | None = None) -> int:
        if isinstance(result, BaseException):
            raise result
        return result

    return run


@pytest.mark.parametrize("code", [0, 1])
def test_the_commands_own_code_is_the_exit_code(code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_command(command(code))
    assert caught.value.code == code
    assert capsys.readouterr() == ("", "")


def test_bad_input_is_a_message_with_one_line_a_part(capsys: pytest.CaptureFixture[str]) -> None:
    error = CoaloraError("budgets are positive", got="-1", expected="above 0", remedy="--set a.b=2")
    with pytest.raises(SystemExit) as caught:
        run_command(command(error))
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "error: budgets are positive",
        "  got:      -1",
        "  expected: above 0",
        "  remedy:   --set a.b=2",
    ]


def test_parts_that_an_error_has_not_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_command(command(CoaloraError("only the rule")))
    assert capsys.readouterr().err == "error: only the rule\n"


def test_an_interruption_says_how_to_resume(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_command(command(KeyboardInterrupt()))
    assert caught.value.code == 130
    assert "run the same command again to resume" in capsys.readouterr().err


def test_a_defect_is_not_dressed_up_as_bad_input() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(command(ZeroDivisionError()))


def test_arguments_are_passed_on() -> None:
    seen: list[Sequence[str] | None] = []

    def run(arguments: Sequence[str] | None) -> int:
        seen.append(arguments)
        return 0

    with pytest.raises(SystemExit):
        run_command(run, ["demo"])
    assert seen == [["demo"]]


def test_changes_add_up_over_options() -> None:
    options = parser("flows.pipeline", "words").parse_args(
        ["demo", "--set", "a.b=1", "c=2", "--refresh", "train", "--set", "d=3", "--refresh", "search"]
    )
    assert (options.name, options.file) == ("demo", "pipelines.yaml")
    assert options.changes == ["a.b=1", "c=2", "d=3"]
    assert options.refresh == ["train", "search"]


def test_an_unknown_part_lists_the_parts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parser("flows.stage", "words", parts=("training", "export")).parse_args(["evaluate", "demo"])
    assert caught.value.code == 2
    assert "choose from 'training', 'export'" in capsys.readouterr().err


BAD_INPUT = [
    (
        pipeline.main,
        ["demo", "--set", "search.round=3"],
        ["error: settings must fit: pipeline 'demo' of pipelines.yaml", "did you mean 'rounds'?", "  remedy:   "],
    ),
    (pipeline.main, ["dmo"], ["error: the pipeline must be defined", "  got:      dmo", "demo", "sst2-minilm"]),
    (pipeline.main, ["demo", "--file", "x.yaml"], ["error: the file of pipelines must exist", "  got:      x.yaml"]),
    (pipeline.main, ["demo"], ["error: DVC must be initialised", "dvc init", "versioning.enabled=false"]),
    (stage.main, ["training", "demo", "--refresh", "trane"], ["error: a stage to refresh must exist", "calibrate"]),
    (stage.main, ["export", "demo", "--set", "evaluation.budgets=[1]"], ["error: budgets lie inside"]),
    (
        adapt.main,
        ["runs/demo/latest", "--budget", "3.5", "--out", "adapted"],
        ["error: a run folder is what a finished pipeline wrote", "python -m flows.pipeline demo"],
    ),
]


@pytest.mark.parametrize(("main", "arguments", "lines"), BAD_INPUT)
def test_a_command_with_bad_input_ends_with_2_and_creates_nothing(
    checkout: Path,
    capsys: pytest.CaptureFixture[str],
    main: Callable[[Sequence[str] | None], int],
    arguments: list[str],
    lines: list[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_command(main, arguments)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    for line in lines:
        assert line in err
    assert [p.name for p in checkout.iterdir()] == ["pipelines.yaml"]


def test_in_a_terminal_too(checkout: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("COALORA_", "PREFECT_", "MLFLOW_"))}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PREFECT_HOME": str(checkout.parent / "prefect")}
    done = subprocess.run(
        [sys.executable, "-m", "flows.pipeline", "demo", "--set", "search.rounds=two"], cwd=checkout, env=environment,
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr[-3000:]
    assert done.stdout == ""
    assert done.stderr.startswith(
        "error: settings must fit: pipeline 'demo' of pipelines.yaml\n  got:      search.rounds"
    )
    assert [p.name for p in checkout.iterdir()] == ["pipelines.yaml"]
