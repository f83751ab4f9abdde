"""Files of a saved base model: its folder, local or of the hub, and the digest that identifies its weights."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import safe_open

from coalora.errors import CoaloraError
from coalora.files import digest, file_sha256, reading

MODEL_FILES = (".json", ".safetensors", ".txt", ".model", ".py")


def model_folder(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The folder of a base model: itself, or the hub's snapshot, which is downloaded if it is not there.

    A snapshot's folder is named after its commit.

    Raises:
        CoaloraError: neither a folder nor a model of the hub.
    """
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    patterns = [*(f"*{suffix}" for suffix in MODEL_FILES), "README.md"]  # whose head names the licence
    return hub_folder(f"The base model {name_or_path}", str(name_or_path), patterns, revision)


def hub_folder(what: str, repo: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """A folder with the files of a hub repository that match `patterns`, downloaded where they are not there.

    Args:
        what: it is, for a message.

    Raises:
        CoaloraError: the hub does not give them.
    """
    from huggingface_hub import snapshot_download

    with _asked_for(what):
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))


def hub_file(repo: str, name: str, revision: str | None = None) -> Path:
    """One file of a hub repository, downloaded if it is not there.

    Raises:
        CoaloraError: the hub does not give it.
    """
    from huggingface_hub import hf_hub_download

    with _asked_for(f"{name} of the base model {repo}"):
        return Path(hf_hub_download(repo, name, revision=revision))


def _asked_for(what: str) -> AbstractContextManager[None]:
    return hub_faults(
        f"{what} is in no local folder, and the hub does not give it",
        "Check model.name_or_path and the network; a hub id looks like 'FacebookAI/roberta-large'",
    )


@contextmanager
def hub_faults(problem: str, remedy: str) -> Iterator[None]:
    """Errors of the hub's client as a `CoaloraError`, with their first line."""
    try:
        yield
    except Exception as error:  # of any kind: without a network, those of its HTTP library
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise CoaloraError(f"{problem} ({reason})", remedy=remedy) from error


def gguf_path(name_or_path: str | Path, gguf_file: str, revision: str | None = None) -> Path:
    """The GGUF file of a local folder, or of a hub repository, from which it is downloaded if it is not there.

    Raises:
        CoaloraError: there is no such file, or its first bytes are not GGUF's.
    """
    file = Path(name_or_path, gguf_file)
    if not Path(name_or_path).is_dir():
        file = hub_file(str(name_or_path), gguf_file, revision)
    if not file.is_file():
        near = sorted(path.name for path in file.parent.glob("*.gguf"))
        raise CoaloraError(
            f"There is no file {gguf_file} in {name_or_path}",
            remedy=f"Set model.gguf_file to {' or '.join(near[:5])}" if near else "Correct model.name_or_path",
        )
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise CoaloraError(f"{file} is no GGUF file", remedy="Download it again, or name another one")
    return file


def package_folder(package: str) -> Path:
    """The folder of an installed Python package that carries a model; the package is not imported.

    Raises:
        CoaloraError: it is not installed.
    """
    try:
        found = find_spec(package) if package.isidentifier() else None
    except (ImportError, ValueError):
        found = None
    if found is None or not found.submodule_search_locations:
        raise CoaloraError(
            f"There is no package {package!r} with the base model in this environment",
            remedy="Install it with pip, or set model.name_or_path to a folder or a hub id",
        )
    return Path(found.submodule_search_locations[0])


def model_files(folder: Path) -> list[Path]:
    """The files that make up a saved model and its tokenizer.

    Raises:
        CoaloraError: there is no config.json, or no safetensors weights.
    """
    files = sorted(p for p in folder.iterdir() if p.suffix in MODEL_FILES) if folder.is_dir() else []
    names = [p.name for p in files]
    if "config.json" not in names or not any(n.endswith(".safetensors") for n in names):
        raise CoaloraError(
            f"The base model {folder} has no config.json or no safetensors weights ({', '.join(names) or 'nothing'})",
            remedy="Set model.name_or_path to a folder that save_pretrained wrote (pickled weights are not read)",
        )
    return files


def model_digest(folder: Path, contents: Callable[[Sequence[Path]], str] | None = None) -> str:
    """sha256 of a saved model's file names and contents: what adapters and configurations are bound to.

    Args:
        contents: digest of the contents of files, in order, where they need not be read again.
    """
    files = model_files(folder)
    return digest([[p.name for p in files], contents(files) if contents else digest([file_sha256(p) for p in files])])


def count_parameters(folder: Path) -> int:
    """Numbers in all tensors of a saved model; tensors that share one place are saved once.

    Raises:
        CoaloraError: a damaged file.
    """
    total = 0
    for file in model_files(folder):
        if file.suffix == ".safetensors":
            with reading(file), safe_open(file, framework="np") as opened:
                total += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    return total


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """`save_pretrained` of both, with the rights of new files: safetensors writes for its owner alone."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", file)
