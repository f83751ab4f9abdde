"""DVC repository opened for one call: silent, with a bounded wait for its lock, its errors as `CoaloraError`."""

import configparser
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from coalora.errors import CoaloraError
from pipeline.progress import get_logger
from pipeline.scrub import one_line, scrub_text
from pipeline.words import human_seconds

LOCK_TIMEOUT_SECONDS = 600.0
_T = TypeVar("_T")


def initialised(repo_root: Path) -> Path:
    """The absolute root of a DVC repository."""
    root = repo_root.resolve()
    if not (root / ".dvc").is_dir():
        raise CoaloraError(
            f"{root} is no DVC repository: it has no .dvc",
            remedy="Run `dvc init` there (`--subdir` inside a larger git repository, `--no-scm` without git), "
            "or set versioning.enabled=false",
        )
    return root


def check_repository(repo_root: Path, *, push: bool) -> None:
    """Refuse a folder in which DVC cannot add sets, or with `push` not send them, before anything is computed."""
    root = initialised(repo_root)
    config = configparser.ConfigParser(strict=False, interpolation=None)
    try:
        config.read([root / ".dvc/config", root / ".dvc/config.local"], encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError) as error:
        raise CoaloraError(f"{root / '.dvc/config'} is damaged ({one_line(error)})", remedy="Mend it") from error
    without_git = config.get("core", "no_scm", fallback="false").strip().lower() == "true"
    if not without_git and not any((folder / ".git").exists() for folder in (root, *root.parents)):
        raise CoaloraError(
            f"{root} has .dvc, and no git around it, so that DVC refuses every command",
            remedy="Run `git init`, or `dvc config core.no_scm true` to use DVC without git, or set "
            "versioning.enabled=false",
        )
    if push and not config.get("core", "remote", fallback=None):
        from dvc.config import Config  # which reads the user's and the machine's files as well

        if not Config(str(root / ".dvc"))["core"].get("remote"):
            raise CoaloraError(
                f"versioning.push is on, and DVC has no default remote in {root}",
                remedy="Run `dvc remote add --default NAME s3://BUCKET/PREFIX`, or set versioning.push=false",
            )


def with_repository(
    root: Path, command: str, do: Callable[[Any], _T], *, timeout_seconds: float = LOCK_TIMEOUT_SECONDS
) -> _T:
    """`do(repo)` with an open `dvc.repo.Repo`; while another DVC command holds the lock, it is tried again.

    Args:
        root: folder that holds `.dvc`.
        command: what a person would type instead, for messages.
        timeout_seconds: how long to wait for the lock. The kernel frees the lock of a killed command.

    Raises:
        CoaloraError: the lock stays taken, a file of DVC's is damaged, or DVC refuses.
    """
    from dvc.lock import LockError

    deadline, told = time.monotonic() + timeout_seconds, False
    while True:
        try:
            return _once(root, command, do)
        except LockError as error:
            if time.monotonic() >= deadline:
                raise CoaloraError(
                    f"Another DVC command has held the lock of {root} for {human_seconds(timeout_seconds)} "
                    f"({one_line(error)})",
                    remedy=f"Wait for it or end it (`fuser {root / '.dvc/tmp/lock'}` shows it), then run again: "
                    "finished stages are kept",
                ) from error
            if not told:
                get_logger().info("waiting for another DVC command in %s to end", root)
                told = True
            time.sleep(min(1.0, max(0.0, deadline - time.monotonic())))


def with_remotes(root: Path, command: str, do: Callable[[Any], _T], *, problem: str, remedy: str) -> _T:
    """`with_repository` for what asks a remote, whose file system raises errors of its own library."""
    try:
        return with_repository(root, command, do)
    except CoaloraError:
        raise
    except Exception as error:
        reason = scrub_text(f"{type(error).__name__}: {one_line(error)}")[:300]
        raise CoaloraError(f"{problem} ({reason})", remedy=remedy) from error


def _once(root: Path, command: str, do: Callable[[Any], _T]) -> _T:
    from dvc.exceptions import DvcException
    from dvc.lock import LockError
    from dvc.repo import Repo
    from dvc.rwlock import RWLockFileCorruptedError, RWLockFileFormatError
    from dvc.utils.serialize import ParseError
    from dvc.utils.strictyaml import YAMLValidationError
    from scmrepo.exceptions import SCMError

    # DVC shows progress bars and git advice whenever its logger would show errors; ours are raised.
    logger = logging.getLogger("dvc")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with Repo(str(root)) as repo:
            return do(repo)
    except LockError:
        raise
    except (RWLockFileCorruptedError, RWLockFileFormatError) as error:
        raise CoaloraError(
            f"DVC's record of running commands is damaged ({one_line(error)})",
            remedy=f"When no DVC command runs, delete {root / '.dvc/tmp/rwlock'} and run again: it holds nothing else",
        ) from error
    except (ParseError, YAMLValidationError) as error:
        raise CoaloraError(
            f"dvc.lock or a .dvc file is damaged ({one_line(error)})",
            remedy="Resolve what git could not merge in it (`git checkout --theirs dvc.lock`, or delete the file: "
            "`dvc repro` writes it anew without computing anything that is cached)",
        ) from error
    except (DvcException, SCMError) as error:
        raise CoaloraError(
            f"DVC refused `{command}` ({one_line(error)})",
            remedy=f"See what `{command}` says in {root}, or set versioning.enabled=false",
        ) from error
    finally:
        logger.setLevel(level)
