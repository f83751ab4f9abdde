"""Command line `coalora`: what a run folder or a bundle alone answers, and, in a checkout, the pipeline's commands.

A checkout's rooms `flows` and `infra` stand beside this package; each has a module `commands` with `add_to(app)`, which
is looked for and never imported from here by name, so that the wheel works without them.

Exit codes: 0 done, 1 not as it should be (`verify`, `stack status`), 2 bad input, 130 interrupted. torch, PEFT, Prefect
and MLflow are imported by the commands that need them, so that `--help` and a mistake are answered at once.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any, TextIO, cast

import typer
from typer.core import TyperCommand

from coalora.errors import CoaloraError, printable
from coalora.process import set_variables

ROOMS = ("flows", "infra")
OURS = ("coalora", "pipeline", "tasks", *ROOMS)
# `module:function`, which a checkout replaces: what opens addresses, and what refuses folders to write to.
hooks = {"open": "coalora.export.source:open_source", "refuse": "coalora.files:require_new"}
_INSTALL = "pip install 'coalora[pipeline]'"


class Command(TyperCommand):
    """A command whose repeatable options take several values at once: `--set a=1 b=2` is `--set a=1 --set b=2`.

    An empty value, as of a shell variable that is not set, is refused: it would mean what leaving it out does.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        repeatable = {
            name for param in self.get_params(ctx) if getattr(param, "multiple", False) for name in param.opts
        }
        for before, word in zip(["", *args], args, strict=False):
            name, equals, value = word.partition("=")
            if not word or (name.startswith("--") and equals and not value):
                where = name or (before if before.startswith("--") else "an argument")
                raise CoaloraError(f"The value of {where} is empty", remedy="Give one, or leave it out")
        spread: list[str] = []
        option, given = "", 0
        for word in args:
            if word in repeatable:
                option, given = word, 0
            elif given and word.startswith("-") and not word[1:2].isdigit():
                option = ""
            elif option:
                spread += [option] if given else []
                given += 1
            spread.append(word)
        return super().parse_args(ctx, spread)


Out = Annotated[Path, typer.Option(metavar="DIR", help="Folder to write; new or empty.")]


def adapt(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="Run folder, bundle, hub repository, or s3://... and models:/NAME@ALIAS."
        ),
    ],
    out: Out,
    bits: Annotated[float | None, typer.Option(help="Average bits a weight of the target layers, at most.")] = None,
    size: Annotated[str | None, typer.Option(metavar="1.2GB", help="Bytes of base and adapter, at most.")] = None,
    latency: Annotated[str | None, typer.Option(metavar="20ms", help="Time by --table, at most.")] = None,
    table: Annotated[Path | None, typer.Option(metavar="CSV", help="A device's latencies.")] = None,
    configuration: Annotated[Path | None, typer.Option(metavar="JSON", help="A configuration instead.")] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME|YAML", help="Profile of a device: its limit, choices and formats.")
    ] = None,
    to: Annotated[
        list[str],
        typer.Option(metavar="FORMAT ...", help="By default those of the run; peft alone needs no base model."),
    ] = [],  # noqa: B006
    model: Annotated[
        str | None, typer.Option(metavar="FOLDER|ID", help="Base model; by default where it was trained from.")
    ] = None,
    adapter_dtype: Annotated[
        str | None,
        typer.Option(metavar="TYPE", help="Of the adapter, float32 to int4, or auto: the best within --size."),
    ] = None,
    evaluate: Annotated[Path | None, typer.Option(metavar="TEXT", help="Measure the pair on a text file.")] = None,
) -> None:
    """Write base and adapter for a device, without training.

    For any budget, in the format of its engine.
    """
    log_to_terminal()
    from coalora.export.device import check_limit, export_for
    from coalora.files import require_new

    limit: dict[str, Any] = {
        "bits": bits, "size": size, "latency": latency, "table": table, "configuration": configuration,
        "device": device,
    }  # fmt: skip
    check_limit(**limit)
    _imported(hooks["refuse"])(out)
    require_new(out)
    found = _imported(hooks["open"])(source)
    made = export_for(
        found.bundle, out, **limit, formats=to or (None if device else found.formats), base=model or found.base,
        adapter_dtype=adapter_dtype, evaluate=evaluate, about=found.about, trust_remote_code=found.trust_remote_code,
    )  # fmt: skip
    print(made)


def inspect(path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder or file.")]) -> None:
    """Say what a run folder, bundle, adapter or set is."""
    from coalora.contents import describe

    facts = describe(path)
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


Thing = Annotated[Path, typer.Argument(metavar="PATH", help="Folder or file, as for inspect.")]


def compare(a: Thing, b: Thing) -> None:
    """Say in what two exports, bundles or sets differ.

    Facts, and layers with other choices.
    """
    from coalora.contents import compare as differences

    found = differences(a, b)
    widths = [max(len(row[column]) for row in found) for column in (0, 1)] if found else []
    for name, one, other in found:
        print(f"{name:<{widths[0]}}  {one:<{widths[1]}}  {other}")
    print(f"{len(found) or 'nothing'} different")


def push(
    export: Annotated[Path, typer.Argument(metavar="DIR", help="An export, or a bundle.")],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository of the hub; made where it is missing.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository a private one.")] = False,
) -> None:
    """Check an export and upload it to the hub.

    With its model card.

    Logged in by `hf auth login` or HF_TOKEN.
    """
    from coalora.contents import push as upload

    print(upload(export, repo, private=private))


def verify(path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder or file, as for inspect.")]) -> int:
    """Check digests and shapes of a run folder or a part.

    An export is run as well, by those engines of its formats that are installed. Exit code 1 where something is wrong.
    """
    from coalora.contents import problems, run_in_engines

    checked, found = problems(path)
    try:
        for line in [] if found else run_in_engines(path):
            print(line)
    except CoaloraError as error:
        found = [str(error)]
    for problem in found:
        print(f"wrong: {problem}")
    print(f"{path}: {len(checked)} parts checked, {len(found) or 'nothing'} wrong")
    return 1 if found else 0


def _imported(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


class _Terminal:
    """Standard output that shows paths and names of others as they are, and does not let them write on the screen."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(printable(text, colours=True))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; bad input is a message on standard error."""
    with redirect_stdout(cast(TextIO, _Terminal(sys.stdout))):
        return _main(arguments)


def _main(arguments: Sequence[str] | None) -> int:
    set_variables()
    here = os.getcwd()
    sys.path.insert(0, here)  # as `python -m` does: the checkout's rooms
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        command = typer.main.get_command(command_line())
        with command.make_context("coalora", given or ["--help"]) as context:
            return int(command.invoke(context) or 0)
    except typer.Exit as ended:
        return ended.exit_code
    except CoaloraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        missing = str(error.name).partition(".")[0]
        if missing in OURS:
            raise
        problem = CoaloraError(f"This command needs the package {missing}", remedy=f"Run {_INSTALL}")
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted. Run the same command again to resume: finished stages are kept.", file=sys.stderr)
        return 130
    except Exception as error:
        if not hasattr(error, "format_message"):  # click's errors of usage; typer does not export their class
            raise
        at = getattr(error, "ctx", None)
        remedy = f"See `{at.command_path if at else 'coalora'} --help`"
        if not any(map(_in_checkout, ROOMS)):
            remedy += f"; commands of the pipeline are those of a checkout, called in its root after {_INSTALL}"
        print(f"error: {CoaloraError(error.format_message(), remedy=remedy)}", file=sys.stderr)
        return 2
    finally:
        sys.path.remove(here)


def command_line() -> typer.Typer:
    """The commands of this package and of the checkout that it stands in."""
    app = typer.Typer(
        name="coalora",
        help="Train one adapter, ship it at any bit-width.",
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    )
    app.callback()(lambda: None)  # a single command would stand without its name
    for room in ROOMS:
        if _in_checkout(room):
            importlib.import_module(f"{room}.commands").add_to(app)
    for command in (adapt, inspect, compare, verify, push):
        app.command(command.__name__, cls=Command)(command)
    return app


def _in_checkout(room: str) -> bool:
    """Whether a room with commands stands beside a folder `coalora`: not somebody else's package of that name."""
    found = importlib.util.find_spec(room)
    folders = [Path(place) for place in (found.submodule_search_locations or [])] if found else []
    return any((f / "commands.py").is_file() and (f.parent / "coalora" / "cli.py").is_file() for f in folders)


def log_to_terminal() -> None:
    """Progress lines of the library on standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(asctime)s  %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("coalora").setLevel(logging.INFO)
