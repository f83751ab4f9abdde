"""Files of a saved base model: its folder, local or of the hub, and the digest that identifies its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from coalora.errors import CoaloraError
from coalora.files import digest, file_sha256

MODEL_FILES = (".json", ".safetensors", ".txt", ".model", ".py")


def model_folder(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The folder of a base model: itself, or the hub's snapshot, which is downloaded if it is not there.

    A snapshot's folder is named after its commit.

    Raises:
        CoaloraError: neither a folder nor a model of the hub.
    """
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        patterns = [f"*{suffix}" for suffix in MODEL_FILES]
        return Path(snapshot_download(str(name_or_path), revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, ValueError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CoaloraError(
            f"The base model {name_or_path} is no local folder, and the hub does not give it ({reason})",
            remedy="Check model.name_or_path and the network; a hub id looks like 'FacebookAI/roberta-large'",
        ) from error


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
