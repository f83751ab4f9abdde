"""Tracking server or database: where it is, whether it answers, what to do about its faults. MLflow is not imported.

Nothing is lost by a fault: stages lie in the store, and what is logged can be logged again. So a locked database is
waited for, and an error names the way on instead of MLflow's traceback.
"""

import errno
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import TypeVar

from coalora.errors import CoaloraError
from pipeline.environment import coalora_home
from pipeline.faults import LOCKED
from pipeline.progress import get_logger
from pipeline.scrub import scrub_text

T = TypeVar("T")
AGAIN = "run the same command again: what was computed is kept, and only what is missing is logged"
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
    """MLflow server or database: the settings' URI, else `MLFLOW_TRACKING_URI`, else `<COALORA_HOME>/mlflow.db`."""
    return tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{coalora_home() / 'mlflow.db'}"


def require_server(uri: str, *, seconds: float = 10.0) -> None:
    """Refuse the URI of a server that does not answer, before anything is computed; databases pass."""
    if not uri.startswith(("http://", "https://")):
        return
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=seconds) as answer:
            content = answer.read(100)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return  # it lives; MLflow's client has the credentials (MLFLOW_TRACKING_USERNAME and the like)
        raise _unreachable(uri, f"HTTP {error.code}") from error
    except (OSError, ValueError) as error:
        raise _unreachable(uri, str(getattr(error, "reason", error))) from error
    if content.strip() != b"OK":
        raise _unreachable(uri, "what answers is no MLflow server")


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
