"""Tracking server or database: where it is, whether it answers, what to do about its faults. MLflow is not imported.

Nothing is lost by a fault: stages lie in the store, and what is logged can be logged again. So a locked database is
waited for, and an error names the way on instead of MLflow's traceback.
"""

import errno
import json
import os
import re
import sqlite3
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import closing, suppress
from difflib import get_close_matches
from http.client import HTTPException
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from coalora.errors import CoaloraError
from pipeline.environment import coalora_home
from pipeline.faults import LOCKED
from pipeline.progress import get_logger
from pipeline.scrub import has_login, scrub_text

T = TypeVar("T")
AGAIN = "run the same command again: what was computed is kept, and only what is missing is logged"
DATABASE = "mlflow.db"  # in COALORA_HOME, which runs make where nothing else is named
DELAYS = (1.0, 2.0, 4.0)  # seconds; MLflow lets SQLite wait 20 at each try

_FULL = re.compile(r"database or disk is full|No space left on device", re.IGNORECASE)
_AWAY = re.compile(
    r"Max retries exceeded|Connection refused|Connection aborted|RemoteDisconnected|Read timed out|NameResolutionError"
    r"|too many 5\d\d error responses",
    re.IGNORECASE,
)
_DENIED = re.compile(r"\b(401|403)\b|PERMISSION_DENIED|UNAUTHENTICATED", re.IGNORECASE)
_ARTIFACTS = re.compile(r"mlflow-artifacts|/artifacts/", re.IGNORECASE)


def place_of_runs(tracking_uri: str | None = None) -> str:
    """MLflow server or database: the settings' URI, else `MLFLOW_TRACKING_URI`, else `<COALORA_HOME>/mlflow.db`.

    Raises:
        CoaloraError: the address of a server holds a login. A database's may, in the variable.
    """
    uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{coalora_home() / DATABASE}"
    if uri.startswith(("http://", "https://")) and has_login(uri):
        raise CoaloraError(
            f"The address of MLflow's server {scrub_text(uri)} was given with a login in it",
            remedy="Leave it out, and set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            "MLFLOW_TRACKING_TOKEN",
        )
    return uri


def require_server(uri: str, *, experiment: str | None = None, existing: bool = False, seconds: float = 10.0) -> None:
    """Refuse a server that does not answer and a database that cannot be opened, before anything is computed.

    Args:
        experiment: it must not be a deleted one.
        existing: refuse the default database, too, where it would have to be made: nothing can be read from it. One
            at another place is made only of an empty file, which somebody who mistypes its name has not made.
    """
    if not uri.startswith(("http://", "https://")):
        _require_database(uri, experiment, existing=existing)
        return
    try:
        content = _get(f"{uri.rstrip('/')}/health", seconds)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return  # it lives; MLflow's client has the credentials (MLFLOW_TRACKING_USERNAME and the like)
        raise _unreachable(uri, f"HTTP {error.code}") from error
    except (OSError, ValueError, HTTPException) as error:
        raise _unreachable(uri, str(getattr(error, "reason", error))) from error
    if content.strip() != b"OK":
        raise _unreachable(uri, "what answers is no MLflow server")
    if experiment is not None:
        name = quote(experiment, safe="")
        try:
            found = json.loads(
                _get(f"{uri.rstrip('/')}/api/2.0/mlflow/experiments/get-by-name?experiment_name={name}", seconds)
            )
        except (OSError, ValueError, HTTPException):
            return  # there is none of that name, or the client has the credentials
        stage = found.get("experiment", {}).get("lifecycle_stage") if isinstance(found, dict) else None
        _refuse_deleted(stage, experiment, uri)


def set_aside_unfinished(database: Path) -> None:
    """Rename MLflow's SQLite database whose making was cut off, so that it is made anew.

    SQLite commits each step of MLflow's migrations by itself, and what was done of them fails when it is done again:
    such a file would never open. MLflow makes its first experiment last; a file that holds none, no run and no
    registered model was never used. Call it where nobody else is making the database.
    """
    try:
        with closing(sqlite3.connect(f"file:{quote(str(database))}?mode=rw", uri=True)) as opened:
            tables = {name for (name,) in opened.execute("select name from sqlite_master where type = 'table'")}
            holding = tables & {"experiments", "runs", "registered_models"}
            unfinished = {"alembic_version", "experiments", "runs"} <= tables and not any(
                opened.execute(f"select exists (select 1 from {table})").fetchone()[0] for table in holding
            )
    except sqlite3.Error:
        return  # none is there, it is another program's, or no database: who opens it is told
    if unfinished:
        aside = database.with_name(f"{database.name}.unfinished")
        database.replace(aside)
        get_logger().warning("MLflow's database %s was never finished: it is %s now, and made anew", database, aside)


def _get(url: str, seconds: float) -> bytes:
    with urllib.request.urlopen(url, timeout=seconds) as answer:
        content: bytes = answer.read(1 << 16)
        return content


def _require_database(uri: str, experiment: str | None, *, existing: bool) -> None:
    scheme, _, place = uri.partition("://")
    if scheme.partition("+")[0] != "sqlite":
        from sqlalchemy import create_engine

        try:
            create_engine(uri).connect().close()
        except Exception as error:  # of any kind, by the driver: that it cannot be opened is the answer
            raise _closed(uri, scrub_text(str(error).splitlines()[0])[:200]) from error
        return
    path = Path(place.partition("?")[0].removeprefix("/"))
    if not place.startswith("/") or not path.name:
        raise _closed(uri, "the address of a file has three slashes, and four where it is absolute")
    default = path.resolve() == coalora_home() / DATABASE
    if not path.exists():
        if existing or not default:
            raise _missing(path, make=not existing)
        return
    if not (existing or all(os.access(at, os.W_OK) for at in (path, path.parent))):
        raise _closed(uri, f"{path}, or its folder, cannot be written")
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise _closed(uri, error.strerror or str(error)) from error
    if start not in (b"", b"SQLite format 3\0"):
        raise _closed(uri, "the file is no database of SQLite")
    if experiment is not None:
        with (
            suppress(sqlite3.Error),
            closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)) as database,
        ):
            row = database.execute("select lifecycle_stage from experiments where name = ?", [experiment]).fetchone()
            _refuse_deleted(row and row[0], experiment, uri)


def _missing(path: Path, *, make: bool) -> CoaloraError:
    """A file that is none of a mistyped address: only the default database is made without being asked for."""
    names = [file.name for file in path.parent.iterdir() if file.is_file()] if path.parent.is_dir() else []
    near = " or ".join(get_close_matches(path.name, names, n=2))
    correct = "Correct MLFLOW_TRACKING_URI or tracking.tracking_uri" + (f" ({near}?)" if near else "")
    return CoaloraError(
        f"There is no MLflow database {path}",
        remedy=f"{correct}, or make a new one by an empty file: `touch {path}`" if make else correct,
    )


def _refuse_deleted(stage: object, experiment: str, uri: str) -> None:
    if stage == "deleted":
        raise CoaloraError(
            f"The experiment {experiment!r} of MLflow at {scrub_text(uri)} is deleted",
            remedy="Restore it (`mlflow experiments restore`), or set tracking.experiment to another name",
        )


def _closed(uri: str, reason: str) -> CoaloraError:
    return CoaloraError(
        f"MLflow's database {scrub_text(uri)} cannot be opened ({reason})",
        remedy="Correct MLFLOW_TRACKING_URI or tracking.tracking_uri, for example sqlite:////folder/mlflow.db",
    )


def patiently(fn: Callable[[], T], uri: str, *, delays: tuple[float, ...] = DELAYS) -> T:
    """`fn()`, repeated while the database is locked; `fn` must do nothing twice.

    Args:
        uri: where it logs to, for messages.
        delays: seconds between tries.

    Raises:
        CoaloraError: locked to the end, server away, disk full, or access denied. Other errors pass unchanged.
    """
    for delay in (*delays, None):
        try:
            return fn()
        except CoaloraError:
            raise
        except Exception as error:
            if delay is not None and LOCKED.search(_chain(error)):
                get_logger().warning("MLflow's database is locked: next try in %g s", delay)
                time.sleep(delay)
                continue
            told = explanation(error, uri)
            if told is None:
                raise
            raise told from error
    raise AssertionError("the last try returns or raises")


def explanation(error: BaseException, uri: str) -> CoaloraError | None:
    """What to do about an error of MLflow's; None where it is none of the known faults."""
    text, where = _chain(error), scrub_text(uri)
    if LOCKED.search(text):
        return CoaloraError(
            f"MLflow's database {where} is locked by another process",
            remedy="End what holds it (`fuser FILE` names it); for several runs at once track on a server "
            f"(`make up`, then `source .coalora/stack/env`). Then {AGAIN}",
        )
    if _FULL.search(text) or (isinstance(error, OSError) and error.errno == errno.ENOSPC):
        return CoaloraError(f"No space is left for MLflow's {where}", remedy=f"Make room, then {AGAIN}")
    if _DENIED.search(text):
        return CoaloraError(
            f"MLflow at {where} refuses this user ({scrub_text(str(error))[:300]})",
            remedy=f"Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN. Then {AGAIN}",
        )
    if _AWAY.search(text):
        if _ARTIFACTS.search(text) and "/api/2.0/mlflow/" not in text:
            return CoaloraError(
                f"MLflow at {where} answers, but takes no artifacts ({scrub_text(str(error))[:300]})",
                remedy=f"See the server's log: its S3 store may be away, or the bucket missing. Then {AGAIN}",
            )
        return _unreachable(uri, scrub_text(str(error))[:300])
    return None


def _unreachable(uri: str, reason: str) -> CoaloraError:
    return CoaloraError(
        f"MLflow at {scrub_text(uri)} does not answer ({reason})",
        remedy="Start it (`make up`), correct MLFLOW_TRACKING_URI or tracking.tracking_uri, or unset both to track in "
        f"a local database. Then {AGAIN}",
    )


def _chain(error: BaseException) -> str:
    """The texts of an error and its causes."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    return "\n".join(f"{type(at).__name__}: {at}" for at in chain)
