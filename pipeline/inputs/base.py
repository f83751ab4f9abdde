"""Place of the base model that settings name: a hub id, or a folder of safetensors on this machine."""

import os
import shutil
import sys
from pathlib import Path

import filelock

from coalora.errors import CoaloraError
from coalora.models.files import gguf_path, package_folder
from pipeline.environment import coalora_home, used_now
from pipeline.inputs.fingerprint import files_digest, model_digest
from pipeline.settings.sections import ModelSettings

PACKAGE = "package:"  # a base model in the folder of an installed Python package


def base_source(model: ModelSettings) -> str:
    """Hub id or local folder of an existing base model; packages are looked up, and GGUF is unpacked first.

    Raises:
        CoaloraError: a package or a file that is not there; a GGUF file that cannot be read.
    """
    if model.name_or_path is None:
        raise CoaloraError("The base model is pre-trained here, and lies nowhere yet", remedy="Set model.name_or_path")
    name = model.name_or_path
    if name.startswith(PACKAGE):
        name = str(package_folder(name.removeprefix(PACKAGE)))
    return name if model.gguf_file is None else str(_unpacked(gguf_path(name, model.gguf_file, model.revision)))


def base_name(model: ModelSettings) -> str:
    """What reports call an existing base model."""
    if model.gguf_file is not None:
        return Path(model.gguf_file).stem
    source = base_source(model)
    return Path(source).resolve().name if Path(source).is_dir() else source


def model_content(model: ModelSettings) -> str | None:
    """Digest of the files of a base model that lies on this machine; None for the hub's and for pre-training."""
    folder = None if model.name_or_path is None else Path(base_source(model))
    return model_digest(folder) if folder is not None and folder.is_dir() else None


def _unpacked(file: Path) -> Path:
    """The folder that a GGUF file was unpacked to on this machine, once for its content."""
    folder = coalora_home() / "gguf" / files_digest([file])
    if not folder.is_dir():
        from coalora.models.gguf import unpack_gguf  # transformers' models are slow to import

        folder.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                # Before a run has a log.
                print(f"Unpacking {file.name}, once: ten seconds for 100 million weights", file=sys.stderr, flush=True)
                partial = folder.with_suffix(f".{os.getpid()}")
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                unpack_gguf(file, partial)
                partial.rename(folder)
    return used_now(folder)
