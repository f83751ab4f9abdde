"""What the commands share: arguments, logging, and errors as one message with an exit code.

Exit codes: 0 done, 1 the run failed, 2 bad input (settings, and what files and shapes tell, are checked before anything
runs), 130 interrupted (run again to resume).
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence

from coalora.errors import CoaloraError
from pipeline.settings.definitions import DEFAULT_FILE


def parser(program: str, description: str, *, parts: Sequence[str] = ()) -> argparse.ArgumentParser:
    """A parser with the arguments that name a pipeline and change its settings; `part` before them where there are."""
    made = argparse.ArgumentParser(prog=f"python -m {program}", description=description)
    if parts:
        made.add_argument("part", choices=parts, help="what to bring up to date")
    made.add_argument("name", metavar="NAME", help="pipeline, as defined in the file")
    made.add_argument("--file", default=DEFAULT_FILE, help="file of pipelines (default: %(default)s)")
    made.add_argument(
        "--set",
        dest="changes",
        metavar="SECTION.KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="change settings; values are YAML",
    )
    made.add_argument(
        "--refresh",
        metavar="STAGE",
        nargs="+",
        action="extend",
        default=[],
        help="compute these stages again whatever is cached",
    )
    return made


def log_to_terminal() -> None:
    """Progress lines of the core on standard error, without Prefect's."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s  %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("coalora").setLevel(logging.INFO)


def run_command(command: Callable[[Sequence[str] | None], int], arguments: Sequence[str] | None = None) -> None:
    """Run a command and end the process with its exit code; bad input is a message, not a traceback."""
    try:
        code = command(arguments)
    except CoaloraError as error:
        print(f"error: {_spread(error)}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted; finished stages are kept: run the same command again to resume", file=sys.stderr)
        code = 130
    sys.exit(code)


def _spread(error: CoaloraError) -> str:
    lines = [error.problem]
    for word in ("got", "expected", "remedy"):
        value = getattr(error, word)
        if value is not None:
            lines.append(f"  {word + ':':<10}{value}")
    return "\n".join(lines)
