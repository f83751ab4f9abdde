"""Content digests of input files: part of cache keys, so that a changed file runs again and a moved one does not."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from coalora.files import digest, file_sha256, json_bytes, replace_file
from coalora.models import files
from pipeline.environment import coalora_home
from pipeline.settings.sections import BenchmarkSettings

# A file written within one tick of its file system's clock after it was hashed looks the same as before.
_SETTLED_NS = 2_000_000_000


def input_files(settings: BenchmarkSettings) -> list[Path]:
    """The local files that the benchmark is read from."""
    if settings.files is None:
        return []
    files = settings.files
    return [Path(p) for p in (files.train, files.validation, files.search) if p is not None]


def files_digest(paths: Sequence[Path]) -> str:
    """Digest of the contents of `paths`, in order.

    Files are hashed once and remembered by path, size, and times of modification and change.
    """
    memory_file = coalora_home() / "fingerprints.json"
    memory = _read_memory(memory_file)
    known = len(memory)
    found = []
    for path in paths:
        stat = path.stat()
        key = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"
        sha256 = memory.get(key) or file_sha256(path)
        found.append(sha256)
        if time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns) > _SETTLED_NS:
            memory[key] = sha256
    if len(memory) > known:
        memory_file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(memory_file, json_bytes(memory))
    return digest(found)


def _read_memory(file: Path) -> dict[str, str]:
    """What was remembered; nothing where the file is missing or damaged: its content can be had again."""
    try:
        memory = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    well_formed = isinstance(memory, dict) and all(isinstance(v, str) and len(v) == 64 for v in memory.values())
    return memory if well_formed else {}


def model_digest(folder: Path) -> str:
    """Digest of a saved model's files, each hashed once."""
    return files.model_digest(folder, files_digest)
