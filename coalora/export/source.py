"""Sources of bundles: what `coalora adapt` and others take for one.

A run's folder, a bundle's, or a repository of the hub that holds a bundle. The pipeline brings openers of its own:
buckets, MLflow's registry, and runs whose base model lies in the store.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coalora.errors import CoaloraError
from coalora.export.bundle import CALIBRATION, FILES, HEADER, Bundle
from coalora.files import read_json, reading
from coalora.models.files import hub_folder

RUN = "run.json"
_HUB = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """A bundle and what is known beside it.

    Attributes:
        bundle: the bundle.
        base: folder of its base model, where it is known to lie; None: what the bundle names.
        formats: that its run exports; None: nobody has said.
        about: for the record of an export: the run.
        trust_remote_code: whether the base runs code that came with its checkpoint; somebody agreed to it.
    """

    bundle: Bundle
    base: Path | None = None
    formats: Sequence[str] | None = None
    about: dict[str, Any] = field(default_factory=dict)
    trust_remote_code: bool = False


def open_run(folder: Path) -> Source:
    """The bundle of a run's folder."""
    with reading(folder / RUN):
        record = read_json(folder / RUN)
        formats = record["settings"]["export"]["formats"]
        run = {name: record[name] for name in ("pipeline", "identity", "mlflow_run_id") if record.get(name)}
    return Source(Bundle.load(folder / "bundle"), formats=tuple(formats), about={"run": run})


def open_source(address: str | Path, openers: Mapping[str, Callable[[Any], Source]] | None = None) -> Source:
    """The bundle at an address.

    Args:
        openers: by what an address starts with, `s3` for `s3://...` and `models` for `models:/...`; `run` in place of
            `open_run`.

    Raises:
        CoaloraError: there is none, or a kind of address that needs the pipeline in an environment without it.

    Example:
        >>> from coalora.export.source import open_source
        >>> model.save_pretrained(folder / "source")
        >>> open_source(folder / "source").bundle.task
        'language-modeling'
    """
    text = str(address)
    known: dict[str, Callable[[Any], Source]] = {"run": open_run, **(openers or {})}
    kind = text.partition(":")[0] if re.match(r"[a-z0-9]+:/", text) else ""
    if kind:
        if kind not in known or kind == "run":
            can = ", ".join(sorted(f"{name}:" for name in known if name != "run")) or "folders and hub ids alone"
            raise CoaloraError(
                f"{text[:200]} cannot be opened here, which knows {can}",
                remedy="Call this in a checkout, with pip install 'coalora[pipeline]', or download the bundle first",
            )
        return known[kind](text)
    path = Path(address)
    if (path / RUN).is_file():
        return known["run"](path)
    if (path / HEADER).is_file():
        return Source(Bundle.load(path))
    if path.exists() or not _HUB.fullmatch(text):
        what = "is no run folder or bundle" if path.exists() else "does not exist"
        raise CoaloraError(
            f"{text[:200]} {what}", remedy="Name a run folder such as runs/demo/latest, a bundle, or a hub repository"
        )
    found = hub_folder(f"The repository {text}", text, [HEADER, *FILES, *CALIBRATION])
    if not (found / HEADER).is_file():
        raise CoaloraError(f"The hub repository {text} holds no bundle", remedy="Push one with `coalora push`")
    return Source(Bundle.load(found))
