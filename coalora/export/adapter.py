"""PEFT adapters on disk, each bound to the quantized base that it was made for.

The folder is PEFT's own format and loads with stock `PeftModel.from_pretrained`. Beside it stands `coalora.json` with
the digest of the base's configuration, repeated in the tensors' header, and the sha256 of PEFT's two files: alpha,
rank, initialisation, DoRA, bias and every tensor are those that were written. Stock PEFT ignores it, `load_adapted`
checks it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from coalora.adapt.lora import lora_config
from coalora.errors import CoaloraError
from coalora.export.compact import CHOICES, COMPACT, load_compact, pack_adapter, packed_like
from coalora.files import (
    check_files,
    file_digests,
    json_bytes,
    read_header,
    read_json,
    read_tensors,
    stored_nbytes,
    write_json,
    write_tensors,
)
from coalora.models.targets import TargetLayer

BINDING = "coalora.json"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FACTS = 1000  # bytes of the binding, and of the base's name and the heads in PEFT's config


def peft_key(name: str) -> str:
    """PEFT's name in `adapter_model.safetensors` of a module's parameter."""
    return f"base_model.model.{name}"


def adapter_nbytes(layers: Sequence[TargetLayer], ranks: Sequence[int], head_size: int, dtype: torch.dtype) -> int:
    """Size of an adapter's folder, whatever the configuration.

    Args:
        ranks: (N,) of the layers.
        head_size: numbers of a classifier's head.

    Example:
        >>> from coalora.export.adapter import adapter_nbytes
        >>> adapter_nbytes(tables.layers, [4] * len(tables.layers), 0, torch.float16) > 0
        True
    """
    tensors = {"head": torch.empty(head_size, device="meta")}
    for layer, rank in zip(layers, ranks, strict=True):
        for side, shape in (("A", (rank, layer.shape[1])), ("B", (layer.shape[0], rank))):
            tensors[peft_key(f"{layer.name}.lora_{side}.weight")] = torch.empty(shape, device="meta")
    stored = packed_like(tensors, dtype) if dtype in CHOICES else {k: t.to(dtype) for k, t in tensors.items()}
    digest = "0" * 64
    binding = {"base_configuration_digest": digest, "base_digest": digest, "dtype": str(dtype)}
    config = lora_config(layers, "language-modeling", ranks=ranks, scale=1.5)
    return stored_nbytes(stored, binding) + len(_config_bytes(config)) + _FACTS


def write_adapter(
    folder: Path,
    config: LoraConfig,
    tensors: dict[str, Tensor],
    configuration: dict,
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a PEFT adapter folder, or for int8 and int4 one that `coalora.load_adapted` alone reads.

    Args:
        config: PEFT's config; saved for inference.
        tensors: adapter tensors under PEFT's names.
        configuration: as in `configuration_dict`, with its `digest`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_bytes(_config_bytes(config))
    binding = {"base_configuration_digest": configuration["digest"], "base_digest": configuration["base_digest"]}
    if dtype in CHOICES:
        binding |= {"dtype": str(dtype).removeprefix("torch.")}
        name, sha256 = COMPACT, write_tensors(folder / COMPACT, pack_adapter(tensors, dtype), binding)
    else:
        name, sha256 = WEIGHTS, write_tensors(folder / WEIGHTS, tensors, binding, dtype=dtype)
    write_json(folder / BINDING, binding | {"files": {**file_digests(folder, [CONFIG]), name: sha256}})


def _config_bytes(config: LoraConfig) -> bytes:
    saved = config.to_dict() | {"inference_mode": True}
    # PEFT keeps sets; their order changes from run to run.
    return json_bytes({k: sorted(v) if isinstance(v, set) else v for k, v in saved.items()})


def weights_of(folder: Path) -> Path:
    """The file of an adapter's tensors: PEFT's, or that of integers (`coalora.export.compact`)."""
    return folder / (COMPACT if (folder / COMPACT).is_file() else WEIGHTS)


def read_adapter(base: PreTrainedModel, folder: Path) -> PeftModel:
    """`base` with the adapter in `folder`, in eval mode.

    Raises:
        CoaloraError: a tensor is missing, unknown or of another size.
    """
    if weights_of(folder).name == COMPACT:
        stored, header = read_tensors(folder / COMPACT)
        return load_compact(base, str(folder), stored, getattr(torch, header["dtype"]))
    try:
        model = PeftModel.from_pretrained(base, str(folder)).eval()
    except (KeyError, RuntimeError) as error:  # a head that is missing, a tensor of another size
        raise CoaloraError(
            f"PEFT cannot load the adapter {folder} ({str(error)[:200]}): a tensor is missing or has another size",
            remedy="Export the adapter again",
        ) from error
    _check_complete(model, folder)
    return model


def check_binding(folder: Path, digest: str) -> None:
    """Refuse an adapter that was made for another quantized base, or whose files are not those that were exported.

    Raises:
        CoaloraError: the digests differ (both are shown), the adapter carries none, or a file is not the one that was
            exported with `coalora.json`.
    """
    folder = Path(folder)
    weights = weights_of(folder)
    for name in (BINDING, weights.name):
        if not (folder / name).is_file():
            raise CoaloraError(
                f"There is no {name} in {folder}, so nothing says which quantized base the adapter is for",
                remedy="Export the adapter with this project, or load it with PEFT at your own risk",
            )
    binding, header = read_json(folder / BINDING), read_header(weights)
    if not isinstance(binding, dict) or "base_configuration_digest" not in binding:
        raise CoaloraError(f"{BINDING} of {folder} names no quantized base", remedy="Export the adapter again")
    files = binding.pop("files", None)
    if header != binding:
        raise CoaloraError(
            f"{weights.name} of {folder} carries {header}, and its {BINDING} {binding}",
            remedy="Export the adapter again: a file in its folder was exchanged or saved anew",
        )
    bound = binding["base_configuration_digest"]
    if bound != digest:
        raise CoaloraError(
            f"The adapter was made for the quantized base {bound}, and this one is {digest}",
            remedy="Load the adapter that was exported beside this base",
        )
    check_files(folder, files, (CONFIG, weights.name))


def _check_complete(model: PeftModel, folder: Path) -> None:
    """Refuse an adapter that does not set every tensor of its model, or holds others: PEFT makes up what is missing.

    Raises:
        CoaloraError: with the first names.
    """
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        stored = set(file.keys())
    # Embeddings are never trained here; asked to find that out, PEFT would look for the base on the hub.
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if wrong := sorted(stored ^ wanted):
        raise CoaloraError(
            f"{', '.join(wrong[:3])} of the adapter {folder} are missing or unknown ({len(stored - wanted)} unknown, "
            f"{len(wanted - stored)} missing)",
            remedy="Export the adapter again",
        )
