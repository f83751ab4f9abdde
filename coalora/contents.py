"""Contents of what the project writes: run folders, bundles, exports, packed bases, adapters and configuration sets.

`describe` says what one is, `problems` whether it is whole: files against the digest that a run left beside them,
configurations against their digests, adapters against their bases, tensors against the shapes that the layers ask for.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from coalora.calibrate.statistics import STATISTICS
from coalora.configurations import SET_FORMAT, configuration_digest, read_choices
from coalora.errors import CoaloraError
from coalora.export.adapter import BINDING, WEIGHTS, check_binding, weights_of
from coalora.export.base import CONFIGURATION, PACKED, REST
from coalora.export.bundle import HEADER, Bundle
from coalora.export.compact import COMPACT
from coalora.export.provenance import RECORD, check_export
from coalora.export.source import RUN
from coalora.files import check_files, file_sha256, folder_nbytes, read_json, read_tensors, reading
from coalora.models.files import hub_faults

SET, MARKER = "configurations.json", ".coalora-artifact"


def kind_of(path: Path) -> str:
    """Kind of a folder or file: `run`, `bundle`, `export`, `base`, `adapter` or `set`.

    Raises:
        CoaloraError: it is none of them.
    """
    if path.is_file():
        try:
            if read_json(path)["format"] == SET_FORMAT:
                return "set"
        except (ValueError, KeyError, TypeError):
            pass
    for name, kind in _KINDS.items():
        if all((path / file).exists() for file in kind.files):
            return name
    raise CoaloraError(
        f"{path} is none of the things that this project writes" if path.exists() else f"{path} does not exist",
        remedy="Name a run folder such as runs/demo/latest, a bundle, an export, a packed base, an adapter or a set",
    )


def describe(path: Path) -> dict[str, str]:
    """Facts of a folder or file by name, its kind first.

    Raises:
        CoaloraError: it is of no known kind, or damaged.
    """
    kind = kind_of(path)
    return {"kind": kind, **_readable(path, lambda: _KINDS[kind].describe(path))}


def problems(path: Path) -> tuple[list[Path], list[str]]:
    """Parts that were checked, and what is wrong with them.

    Raises:
        CoaloraError: it is of no known kind.
    """
    checked, found = [path], []
    if kind_of(path) == "run":
        checked += [part for part in (path / "report", path / "bundle") if part.is_dir()]
        checked += _exports(path)
    for part in checked:
        try:
            found += [f"{part}: {problem}" for problem in _readable(part, lambda part=part: list(_check(part)))]  # type: ignore[misc]
        except CoaloraError as error:
            found.append(str(error) if str(part) in str(error) else f"{part}: {error}")
    return checked, found


def run_in_engines(path: Path) -> list[str]:
    """A sentence for each format of an export: run by its engine on a few tokens, or why not; none of other kinds.

    Raises:
        CoaloraError: an engine does not run what it should.
    """
    if kind_of(path) != "export":
        return []
    from coalora.export.engines import ENGINES, log_probabilities

    told = []
    for name in sorted(read_json(path / RECORD)["formats"]):
        if (engine := ENGINES.get(name)) is None:
            continue
        if not engine.installed:
            told.append(f"{name}: not run, {engine.package} is not installed")
            continue
        try:
            found = log_probabilities(path, name, range(1, 5))
        except CoaloraError:
            raise
        except Exception as error:  # of any kind, by the engine
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            raise CoaloraError(f"{engine.package} does not run {path} ({reason})", remedy="Export it again") from error
        sums = found.exp().sum(-1)
        if not bool(((sums - 1).abs() < 1e-2).all()):  # NaN as well
            raise CoaloraError(
                f"{engine.package} runs {path}, and its probabilities sum to {float(sums[0]):.3g}",
                remedy="Export it again, or another format",
            )
        told.append(f"{name}: run by {engine.package}, {len(found)} tokens")
    return told


def push(folder: Path, repo: str, *, private: bool = False) -> str:
    """Upload a checked export or bundle to a repository of the hub; says where it is.

    Raises:
        CoaloraError: it is no export or bundle, or not whole; the hub refuses.
    """
    if (kind := kind_of(folder)) not in ("export", "bundle"):
        raise CoaloraError(f"{folder} is of kind {kind}", remedy="Push an export (`coalora adapt`) or a bundle")
    if found := problems(folder)[1]:
        raise CoaloraError(f"{folder} is not whole: {found[0]}", remedy="Make it again, then push")
    from huggingface_hub import HfApi

    with hub_faults(f"The hub does not take {repo}", "Log in with `hf auth login`, and check the name and network"):
        HfApi().create_repo(repo, private=private, exist_ok=True)
        HfApi().upload_folder(folder_path=folder, repo_id=repo, commit_message=f"{kind.capitalize()} by coalora")
    return f"https://huggingface.co/{repo}: {len(list(folder.rglob('*')))} files and folders of {folder}"


def compare(a: Path, b: Path) -> list[tuple[str, str, str]]:
    """Facts in which two things of one kind differ, as (name, of `a`, of `b`), and layers with other choices.

    Raises:
        CoaloraError: they are of different kinds, or one is of none.
    """
    kinds = kind_of(a), kind_of(b)
    if kinds[0] != kinds[1]:
        raise CoaloraError(f"{a} is of kind {kinds[0]}, and {b} of kind {kinds[1]}", remedy="Name two of one kind")
    first, second = describe(a), describe(b)
    found = [(n, first.get(n, "-"), second.get(n, "-")) for n in {**first, **second} if first.get(n) != second.get(n)]
    if (a / CONFIGURATION).is_file() and (b / CONFIGURATION).is_file():
        one, other = (_layers(p) for p in (a, b))
        found += [
            (name, _choice(one.get(name)), _choice(other.get(name)))
            for name in {**one, **other}
            if one.get(name) != other.get(name)
        ]
    return found


def _layers(folder: Path) -> dict[str, dict[str, Any]]:
    return dict(_readable(folder, lambda: read_json(folder / CONFIGURATION)["layers"]))


def _choice(fields: dict[str, Any] | None) -> str:
    return "-" if fields is None else " ".join(f"{name}={value}" for name, value in fields.items())


def _readable(path: Path, read: Callable[[], Any]) -> Any:
    with reading(path):
        return read()


def _exports(run: Path) -> list[Path]:
    return sorted(path for path in (run / "export").glob("*") if path.is_dir())


def _check(path: Path) -> Iterator[str]:
    if (path / MARKER).is_file():
        yield from _against_marker(path)
    try:
        kind = kind_of(path)
    except CoaloraError:
        return  # a report: files with a digest
    yield from _KINDS[kind].check(path)


def _against_marker(folder: Path) -> Iterator[str]:
    """Files against the digest that is written beside them: sha256 over sorted (path, size, sha256)."""
    marker = read_json(folder / MARKER)
    if not marker["complete"]:
        yield "was not written to its end"
        return
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file() and p.name != MARKER}
    entries = [[name, file.stat().st_size, file_sha256(file)] for name, file in files.items()]
    names = sorted(files)
    for name in sorted(set(names) ^ set(marker["files"])):
        yield f"{name} is {'unknown' if name in names else 'missing'}"
    found = hashlib.sha256(json.dumps(sorted(entries), separators=(",", ":")).encode()).hexdigest()
    if names == marker["files"] and found != marker["digest"]:
        yield f"its files were altered: their digest is {found[:12]}, and {marker['digest'][:12]} was written"


def _check_bundle(folder: Path) -> Iterator[str]:
    bundle = Bundle.load(folder)
    yield from bundle.problems()
    if (folder / STATISTICS).exists():
        _ = bundle.statistics  # against their digests


def _check_run(folder: Path) -> Iterator[str]:
    record = read_json(folder / RUN)
    if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
        yield f"{RUN} is no record of a run"


def _check_export(folder: Path) -> Iterator[str]:
    yield from _check_digest(folder)
    record = check_export(folder)
    if (found := read_json(folder / CONFIGURATION)["digest"]) != record["digest"]:
        yield f"{RECORD} is of the configuration {record['digest'][:12]}, and {CONFIGURATION} has {found[:12]}"
    if (folder / "adapter").is_dir():
        check_binding(folder / "adapter", found)
        yield from _check_adapter(folder / "adapter")
    if (folder / "base").is_dir():
        yield from _check_base(folder / "base")


def _check_digest(folder: Path) -> Iterator[str]:
    content = read_json(folder / CONFIGURATION)
    if (found := configuration_digest(content)) != content["digest"]:
        yield f"{CONFIGURATION} has digest {found[:12]}, and says {content['digest'][:12]}"


def _check_base(folder: Path) -> Iterator[str]:
    yield from _check_digest(folder)
    content = read_json(folder / CONFIGURATION)
    try:
        check_files(folder, content.get("files"), (PACKED, REST))
    except CoaloraError as error:  # one problem beside others
        yield str(error)
        return
    packed, _ = read_tensors(folder / PACKED)
    for name, (scheme, choice) in read_choices(content).items():
        parts = {key.rsplit(".", 1)[1]: t for key, t in packed.items() if key.rsplit(".", 1)[0] == name}
        try:
            scheme.unpack(parts, choice, tuple(content["shapes"][name]))
        except CoaloraError as error:
            yield f"{name}: {error}"


def _check_adapter(folder: Path) -> Iterator[str]:
    if (folder / BINDING).is_file():
        check_binding(folder, read_json(folder / BINDING)["base_configuration_digest"])
    shapes = _shapes(weights_of(folder))
    for name, shape in shapes.items():
        other = shapes.get(name.replace("lora_A", "lora_B"))
        if name.endswith("lora_A.weight") and (other is None or other[1] != shape[0]):
            yield f"{name} is {shape}, and its lora_B {other or 'missing'}"


def _check_set(path: Path) -> Iterator[str]:
    content = _set(path)
    n_layers, n_choices = len(content["layers"]), len(content["choices"])
    for number, member in enumerate(content["members"]):
        if len(member["choices"]) != n_layers or not all(0 <= k < n_choices for k in member["choices"]):
            yield f"member {number} does not give each of {n_layers} layers one of {n_choices} choices"


def _describe_run(folder: Path) -> dict[str, str]:
    record = read_json(folder / RUN)
    exports = ", ".join(path.name for path in _exports(folder))
    facts = {"pipeline": record["pipeline"], "identity": str(record.get("identity")), "exports": exports}
    return facts | (_describe_bundle(folder / "bundle") if (folder / "bundle").is_dir() else {})


def _describe_bundle(folder: Path) -> dict[str, str]:
    bundle = Bundle.load(folder)
    tables, losses = bundle.tables, bundle.members.losses
    bits = tables.average_bits(bundle.members.configurations)
    low, high = tables.cost_range()
    return {
        "base model": bundle.base_model,
        "base digest": tables.base_digest,
        "task": bundle.task,
        "scheme": tables.space.scheme_name,
        "choices": str(len(tables.space.choices)),
        "layers": f"{len(tables.layers)}, {sum(layer.n_weights for layer in tables.layers):,} weights",
        "ranks": ", ".join(map(str, sorted(set(bundle.ranks)))),
        "members": f"{len(bits)}, {bits.min():.3f} to {bits.max():.3f} average bits, best loss {losses.min():.4g}",
        "budgets": f"{low:.4g} to {high:.4g} {tables.cost_unit.unit}",
    }


def _describe_configuration(folder: Path) -> dict[str, str]:
    content = read_json(folder / CONFIGURATION)
    by_bits = Counter(
        str(fields.get("bits", fields.get("type", fields.get("dtype")))) for fields in content["layers"].values()
    )
    facts = {
        "scheme": content["scheme"],
        "average bits": f"{content['average_bits']:.3f}",
        "layers by bits": ", ".join(f"{n} of {bits}" for bits, n in sorted(by_bits.items())),
        "digest": content["digest"],
        "base digest": content["base_digest"],
    }
    if (folder / RECORD).is_file():
        record = read_json(folder / RECORD)
        facts |= {"formats": ", ".join(sorted(record["formats"])), "licence": record["licence"]}
        facts |= {f"run's {name}": str(value) for name, value in record.get("run", {}).items()}
        facts |= {"bytes": f"{folder_nbytes(folder):,}"}
        facts |= {"loss": f"{record['loss']:.4g} on the search split"} if "loss" in record else {}
    return facts | (_describe_adapter(folder / "adapter") if (folder / "adapter").is_dir() else {})


def _describe_adapter(folder: Path) -> dict[str, str]:
    config = read_json(folder / "adapter_config.json")
    bound = read_json(folder / BINDING)["base_configuration_digest"] if (folder / BINDING).is_file() else "none"
    base = folder.parent / "base"
    # The base model's name is an address for the hub's alone: one that was made or unpacked by a run lies nowhere else.
    where = str(base) if base.is_dir() else "BASE"
    return {
        "base model": str(config["base_model_name_or_path"]),
        "ranks": ", ".join(map(str, sorted({config["r"], *(config.get("rank_pattern") or {}).values()}))),
        "tensors": str(len(_shapes(weights_of(folder)))),
        "made for base": bound,
        "load with": f'coalora.load_adapted("{where}", "{folder}")',
    }


def _describe_set(path: Path) -> dict[str, str]:
    content = _set(path)
    bits = [member["average_bits"] for member in content["members"]]
    return {
        "scheme": content["scheme"],
        "base digest": content["base_digest"],
        "layers": str(len(content["layers"])),
        "choices in use": str(len(content["choices"])),
        "members": f"{len(bits)}, {min(bits):.3f} to {max(bits):.3f} average bits",
    }


def _set(path: Path) -> dict[str, Any]:
    return dict(read_json(path / SET if path.is_dir() else path))


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path, framework="np") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)


@dataclass(frozen=True)
class _Kind:
    """Files that tell one kind from others, its description and its checks."""

    files: tuple[str, ...]
    describe: Callable[[Path], dict[str, str]]
    check: Callable[[Path], Iterator[str]] = lambda path: iter(())


# In this order: a bundle holds a set, and a base a configuration.
_KINDS = {
    "run": _Kind((RUN,), _describe_run, _check_run),
    "bundle": _Kind((HEADER,), _describe_bundle, _check_bundle),
    "base": _Kind((CONFIGURATION, PACKED), _describe_configuration, _check_base),
    "adapter": _Kind(("adapter_config.json", WEIGHTS), _describe_adapter, _check_adapter),
    "adapter of integers": _Kind(("adapter_config.json", COMPACT), _describe_adapter, _check_adapter),
    "export": _Kind((CONFIGURATION, RECORD), _describe_configuration, _check_export),
    "set": _Kind((SET,), _describe_set, _check_set),
}
