"""Files whose bytes depend on their content alone: safetensors with one JSON header, and canonical JSON."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from coalora.errors import CoaloraError

if TYPE_CHECKING:  # torch is slow to import, and most of what is here needs none of it
    import numpy as np
    import torch
    from torch import Tensor

_HEADER = "coalora"
# By torch's names and safetensors' own, in the order in which that stores tensors: alignment falls.
_TYPES = {
    "uint64": "U64", "int64": "I64", "float64": "F64", "float32": "F32", "uint32": "U32", "int32": "I32",
    "bfloat16": "BF16", "float16": "F16", "uint16": "U16", "int16": "I16", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor | np.ndarray],
    header: object = None,
    *,
    dtype: torch.dtype | None = None,
    **metadata: str,
) -> str:
    """Write named tensors and a JSON-able header as safetensors, and return the file's sha256.

    Tensors are converted, written and digested one after the other: safetensors' own writer holds a second copy of all,
    orders `metadata` by chance, and leaves the digest to another reading.

    Args:
        dtype: that floating tensors are stored in; None keeps theirs.
        metadata: stands beside the header for other readers.
    """
    import torch

    plain = {name: torch.as_tensor(tensor).detach() for name, tensor in tensors.items()}
    kinds = {name: dtype if dtype and t.is_floating_point() else t.dtype for name, t in plain.items()}
    stored = {name: str(kind).removeprefix("torch.") for name, kind in kinds.items()}
    names = sorted(plain, key=lambda name: ([*_TYPES].index(stored[name]), name))
    told: dict[str, Any] = {"__metadata__": {_HEADER: json.dumps(header, sort_keys=True), **metadata}}
    end = 0
    for name in names:
        start, end = end, end + plain[name].numel() * kinds[name].itemsize
        told[name] = {"dtype": _TYPES[stored[name]], "shape": [*plain[name].shape], "data_offsets": [start, end]}
    head = json.dumps(told, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)

    def data(name: str) -> Any:
        return plain[name].to("cpu", kinds[name]).contiguous().reshape(-1).view(torch.uint8).numpy()

    sha256 = hashlib.sha256()
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")  # tensors may be mapped from the file itself
    try:
        with part.open("wb") as file, ThreadPoolExecutor(1) as digesting:  # both release the interpreter's lock
            pieces: Iterable[Any] = chain([len(head).to_bytes(8, "little") + head], map(data, names))
            for piece in pieces:
                digesting.submit(sha256.update, piece)
                file.write(piece)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return sha256.hexdigest()


def stored_nbytes(tensors: Mapping[str, Tensor], header: object = None) -> int:
    """Size of the file that `write_tensors` makes of tensors, which may be on the meta device.

    Offsets are counted with twelve digits: the file is a few bytes a tensor smaller.
    """
    told: dict[str, Any] = {_HEADER: json.dumps(header)}
    told |= {k: {"dtype": "BF16", "shape": [*t.shape], "data_offsets": [10**11] * 2} for k, t in tensors.items()}
    return 40 + len(json.dumps(told, separators=(",", ":"))) + sum(t.numel() * t.itemsize for t in tensors.values())


def folder_nbytes(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Within, whatever a damaged file makes of its reader ends as an error that names the file.

    Raises:
        CoaloraError: the file is damaged, or is none of the kind that is read.
    """
    try:
        yield
    except MemoryError:
        raise
    except CoaloraError as error:
        if str(path) in str(error):
            raise
        raise CoaloraError(f"{path}: {error.problem}", remedy=error.remedy) from error
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise CoaloraError(f"{path} cannot be read ({reason})", remedy="Make or download it again") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Contents of a file of `write_tensors`: (tensors, header).

    Raises:
        CoaloraError: the file is damaged.
    """
    with reading(path), safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {}).get(_HEADER, "null"))
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118 (no mapping)


def read_header(path: Path) -> Any:
    """The header alone of what `write_tensors` wrote; None where there is none. As `read_tensors`."""
    with reading(path), safe_open(path, framework="pt") as file:
        return json.loads((file.metadata() or {}).get(_HEADER, "null"))


def json_bytes(content: object) -> bytes:
    """Canonical JSON: sorted keys, two spaces, a newline at the end. ValueError for NaN, TypeError for no JSON."""
    return (json.dumps(content, sort_keys=True, indent=2, allow_nan=False) + "\n").encode()


def write_json(path: Path, content: object) -> None:
    """Write canonical JSON."""
    path.write_bytes(json_bytes(content))


def replace_file(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Replace a file in one step: a reader sees the old content or the new, and never what a link points to is written.

    Args:
        durable: the bytes are on the disk before the file has its name.
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        part.write_bytes(content)
        if durable:
            to_disk(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def whole_or_nothing(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its place when the block ends, and goes when the block fails."""
    target = Path(os.path.abspath(target))
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        yield part
        part.replace(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def to_disk(path: Path) -> None:
    """Wait until a file's bytes are on the disk."""
    with suppress(OSError), path.open("rb") as file:  # a file system that cannot is left to its own ways
        os.fsync(file.fileno())


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        CoaloraError: it is no JSON in UTF-8, or nested too deeply. OSError: there is no such file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CoaloraError(f"{path} is no JSON in UTF-8 ({reason})", remedy="Make or download it again") from error


def require_new(out: Path) -> None:
    """Refuse an output folder that is a file, or holds files, or whose name a file has on the way to it."""
    if any(parent.exists() and not parent.is_dir() for parent in out.absolute().parents):
        raise CoaloraError(f"{out} lies below a file", remedy="Name another folder with --out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CoaloraError(f"{out} is not new or empty", remedy="Name another folder with --out")


def require_writable(path: Path) -> None:
    """Refuse a file that could not be written, before the work for it is done."""
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        what = "is a folder" if path.is_dir() else "cannot be written: its folder is missing, or not yours"
        raise CoaloraError(f"{path} {what}", remedy="Name another file, or make its folder")


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """{name: sha256} of files in a folder, for a file beside them that `check_files` is given."""
    return {name: file_sha256(folder / name) for name in sorted(names)}


def check_files(folder: Path, digests: object, names: Iterable[str]) -> None:
    """Refuse files that are not the bytes that were written.

    Args:
        digests: what was written down of `file_digests`.
        names: of the files.

    Raises:
        CoaloraError: a file is missing or has another sha256, or `digests` are not those of these files.
    """
    again = "Export again, or copy the folder as it was exported"
    if not isinstance(digests, Mapping) or sorted(digests) != sorted(names):
        raise CoaloraError(f"{folder} carries no sha256 of {', '.join(sorted(names))}", remedy=again)
    for name in sorted(names):
        if not (folder / name).is_file():
            raise CoaloraError(f"There is no {name} in {folder}", remedy=again)
        if (found := file_sha256(folder / name)) != digests[name]:
            told = str(digests[name])[:12]
            raise CoaloraError(f"{name} of {folder} has sha256 {found[:12]}, and {told} was exported", remedy=again)


def digest(content: object) -> str:
    """sha256 of canonical JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
