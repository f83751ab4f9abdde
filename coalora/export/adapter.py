"""PEFT adapters on disk, each bound to the quantized base that it was made for.

The folder is PEFT's own format and loads with stock `PeftModel.from_pretrained`. Beside it stands `coalora.json` with
the digest of the base's configuration, repeated in the tensors' header; stock PEFT ignores both, `load_adapted` checks
both.
"""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig
from torch import Tensor

from coalora.errors import CoaloraError
from coalora.files import read_header, read_json, write_json, write_tensors

BINDING = "coalora.json"
WEIGHTS = "adapter_model.safetensors"


def peft_key(name: str) -> str:
    """PEFT's name in `adapter_model.safetensors` of a module's parameter."""
    return f"base_model.model.{name}"


def write_adapter(folder: Path, config: LoraConfig, tensors: dict[str, Tensor], configuration: dict) -> None:
    """Write a PEFT adapter folder.

    Args:
        config: PEFT's config; saved for inference.
        tensors: adapter tensors under PEFT's names.
        configuration: as in `configuration_dict`, with its `digest`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    saved = config.to_dict() | {"inference_mode": True}
    # PEFT keeps sets; their order changes from run to run.
    saved = {k: sorted(v) if isinstance(v, set) else v for k, v in saved.items()}
    write_json(folder / "adapter_config.json", saved)
    binding = {"base_configuration_digest": configuration["digest"], "base_digest": configuration["base_digest"]}
    write_tensors(folder / WEIGHTS, tensors, binding)
    write_json(folder / BINDING, binding)


def check_binding(folder: Path, digest: str) -> None:
    """Refuse an adapter that was made for another quantized base.

    Raises:
        CoaloraError: the digests differ (both are shown), the adapter carries none, or its weights are not those
            that were exported with `coalora.json`.
    """
    folder = Path(folder)
    for name in (BINDING, WEIGHTS):
        if not (folder / name).is_file():
            raise CoaloraError(
                f"There is no {name} in {folder}, so nothing says which quantized base the adapter is for",
                remedy="Export the adapter with this project, or load it with PEFT at your own risk",
            )
    binding, header = read_json(folder / BINDING), read_header(folder / WEIGHTS)
    if header != binding:
        raise CoaloraError(
            f"{WEIGHTS} of {folder} carries {header}, and its {BINDING} {binding}",
            remedy="Export the adapter again: a file in its folder was exchanged or saved anew",
        )
    bound = binding["base_configuration_digest"]
    if bound != digest:
        raise CoaloraError(
            f"The adapter was made for the quantized base {bound}, and this one is {digest}",
            remedy="Load the adapter that was exported beside this base",
        )
