"""Packed quantized base on disk, and its loader.

`quantized.safetensors` holds the bit-packed target layers and nothing else, so that its size is the reported bits
(its header aside); `rest.safetensors` every other tensor; `configuration.json` the choice of every layer and the sha256
of both files, which are checked at loading; beside them
the model's config and tokenizer. Loading dequantizes into an ordinary transformers model, or leaves the target layers
packed, to make their weights while they multiply: the same weights, bit for bit, as the model that was evaluated.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save

from coalora.adapt.lora import quiet_peft
from coalora.calibrate.tables import CalibrationTables
from coalora.configurations import configuration_dict, configuration_digest, read_choices
from coalora.errors import CoaloraError
from coalora.export.adapter import check_binding, read_adapter
from coalora.files import check_files, read_json, read_tensors, reading, write_json, write_tensors
from coalora.models.loading import default_device, default_dtype, load_config, meta_model
from coalora.models.switching.packed import move_rest, pack_layer
from coalora.models.targets import TargetLayer, other_tensors
from coalora.quant.scheme import Choice, InputStatistics, Scheme
from coalora.recipes import Task, WeightMode

PACKED, REST, CONFIGURATION = "quantized.safetensors", "rest.safetensors", "configuration.json"


def write_base(
    folder: Path,
    model: PreTrainedModel,
    tables: CalibrationTables,
    configuration: np.ndarray,
    *,
    task: Task,
    statistics: Sequence[InputStatistics] | None = None,
    rest_dtype: torch.dtype | None = None,
) -> None:
    """Pack `model` (in full precision, before PEFT wraps it) under `configuration` (N,) into `folder`.

    `statistics` of the layers' inputs are for calibrated schemes; `rest_dtype` as in `rest_tensors`.

    Raises:
        CoaloraError: as `packed_layers`.
    """
    content = configuration_dict(configuration, tables)
    layers = packed_layers(model, tables, configuration, statistics)
    folder.mkdir(parents=True, exist_ok=True)
    packed = {f"{layer.name}.{part}": tensor for layer, _, parts in layers for part, tensor in parts.items()}
    content |= {
        "average_bits": round(float(tables.average_bits(configuration)), 6),
        "digest": configuration_digest(content),
        "task": task,
        # transformers leaves it out of config.json where it is 2, which is not every architecture's default.
        **({"num_labels": model.config.num_labels} if task == "classification" else {}),
        "shapes": {layer.name: list(layer.shape) for layer in tables.layers},
        "transposed": [layer.name for layer in tables.layers if layer.transposed],
    }
    rest = other_tensors(model, [layer.name for layer in tables.layers], rest_dtype)
    files = {name: write_tensors(folder / name, tensors) for name, tensors in ((PACKED, packed), (REST, rest))}
    write_json(folder / CONFIGURATION, content | {"files": files})
    inference_config(model).save_pretrained(folder)
    if type(model).__module__.startswith("transformers_modules"):  # code that came with the checkpoint
        custom_object_save(model, folder)


def inference_config(model: PreTrainedModel) -> PretrainedConfig:
    """A copy of the model's config, without what was set to train it."""
    config = copy.deepcopy(model.config)
    config.use_cache = True
    return config


def packed_layers(
    model: PreTrainedModel,
    tables: CalibrationTables,
    configuration: np.ndarray,
    statistics: Sequence[InputStatistics] | None = None,
) -> Iterator[tuple[TargetLayer, Choice, dict[str, Tensor]]]:
    """Target layers in their order, each with its choice of a configuration (N,) and what its scheme packs of it.

    Raises:
        CoaloraError: at once: a configuration outside of the tables' layers or choices, a model without their layers,
            or no statistics where weights are calibrated.
    """
    configuration_dict(configuration, tables)
    if statistics is None and tables.rounding != "absmax":
        raise CoaloraError(
            f"The weights of this configuration were quantized with rounding {tables.rounding}, and there are no "
            "statistics of the layers' inputs to do so again",
            remedy="Give the statistics that calibration returned",
        )
    names = {f"{layer.name}.weight" for layer in tables.layers}
    if absent := sorted(names - model.state_dict().keys()):
        raise CoaloraError(
            f"{type(model).__name__} lacks {', '.join(absent[:2])} ({len(absent)} of {len(names)} target weights): it "
            "is another model than the one that was calibrated, or PEFT wraps it",
            remedy="Load the base model anew and pack that",
        )
    known = statistics if statistics is not None else [None] * len(tables.layers)

    def pack() -> Iterator[tuple[TargetLayer, Choice, dict[str, Tensor]]]:
        for layer, k, seen in zip(tables.layers, configuration, known, strict=True):
            weight = layer.matrix(model.get_submodule(layer.name).get_parameter("weight").detach())
            scheme, choice = tables.space.scheme_of(int(k)), tables.space.choices[int(k)]
            yield layer, choice, scheme.quantize_packed(weight, choice, seen)

    return pack()


def load_base(
    folder: Path,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    weights: WeightMode = "dequantized",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model of a packed base, with `coalora_digest` set to its configuration's digest.

    Args:
        weights: `packed` keeps the target layers as they are stored: memory is that of the packed base, its other
            tensors and one layer's weight, and each forward pass dequantizes anew. `device` says where for good.
        trust_remote_code: run the code in the folder, where the architecture is one that came with its checkpoint.

    Raises:
        CoaloraError: the folder is no packed base, a file is not the one that was written, or tensors are missing,
            unknown or have another size.

    Example:
        >>> from coalora import load_base
        >>> model.export(folder / "alone", budget=3.5)
        >>> len(load_base(folder / "alone/base").coalora_digest)
        64
    """
    with reading(Path(folder)):
        return _loaded(Path(folder), device, dtype, weights, trust_remote_code)


def _loaded(
    folder: Path, device: torch.device | None, dtype: torch.dtype | None, weights: WeightMode, trust_remote_code: bool
) -> PreTrainedModel:
    content = _read_configuration(folder)
    check_files(folder, content.get("files"), (PACKED, REST))
    config = load_config(folder, trust_remote_code=trust_remote_code)
    if "num_labels" in content:
        config.num_labels = content["num_labels"]
    choices = read_choices(content)
    packed, _ = read_tensors(folder / PACKED)
    if unknown := sorted(key for key in packed if key.rpartition(".")[0] not in choices):
        raise CoaloraError(
            f"{', '.join(unknown[:3])} of {folder / PACKED} belong to no layer of its {CONFIGURATION} "
            f"({len(unknown)} tensors in all)",
            remedy="Export the base again",
        )
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in packed.items():
        name, part = key.rsplit(".", 1)
        parts.setdefault(name, {})[part] = tensor
    state, _ = read_tensors(folder / REST)
    device = device or default_device()
    dtype = dtype or default_dtype(device)
    for name, (scheme, choice) in choices.items():
        shape, own = tuple(content["shapes"][name]), parts.get(name, {})
        unpacked, transposed = scheme.unpack(own, choice, shape), name in content["transposed"]
        if weights == "packed":  # a weight of no memory, for transformers to be content with
            state[f"{name}.weight"] = torch.zeros((), dtype=dtype).expand(shape[::-1] if transposed else shape)
        else:
            weight = scheme.dequantize(unpacked, choice, shape)
            state[f"{name}.weight"] = weight.T.contiguous() if transposed else weight
    # The Auto classes load a state only from a file; the architecture's own class takes it as it is.
    own_class: Any = type(meta_model(config, content["task"], trust_remote_code=trust_remote_code))
    model, info = own_class.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
    )
    if wrong := sorted({*info["missing_keys"], *info["unexpected_keys"]}):  # transformers would make weights up
        raise CoaloraError(
            f"{', '.join(wrong[:3])} of the packed base {folder} are missing or unknown ({len(wrong)} tensors in all)",
            remedy="Export the base again",
        )
    model.requires_grad_(False)
    model.coalora_digest = content["digest"]
    if weights == "dequantized":
        return model.to(device).eval()
    modules = {name: model.get_submodule(name) for name in choices}
    for name, module in modules.items():
        scheme, choice = choices[name]
        own = {part: tensor.to(device) for part, tensor in parts[name].items()}
        shape, transposed = tuple(content["shapes"][name]), name in content["transposed"]
        kind = module.get_parameter("weight").dtype
        pack_layer(module, _Packed(scheme, choice, own, shape, kind, device, transposed), device)
    move_rest(model, {id(module) for module in modules.values()}, device)
    return model.eval()


@dataclass(frozen=True)
class _Packed:
    """Maker of the weight of one packed layer, as its module stores it."""

    scheme: Scheme
    choice: Choice
    parts: dict[str, Tensor]
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    transposed: bool

    def __call__(self) -> Callable[[], Tensor]:
        return self.make

    def make(self) -> Tensor:
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        self.scheme.dequantize_packed(self.parts, self.choice, self.shape, out)
        return out.T.contiguous() if self.transposed else out


def load_adapted(base_folder: Path, adapter_folder: Path, **options: Any) -> PeftModel:
    """The packed base with its adapter, ready to run; `options` as in `load_base`.

    Raises:
        CoaloraError: the adapter was made for another base (both digests are shown), is not the one that was exported,
            or lacks tensors.

    Example:
        >>> from coalora import load_adapted
        >>> model.export(folder / "device", budget=3.5)
        >>> device = load_adapted(folder / "device/base", folder / "device/adapter")
        >>> device(**model.tokenizer("a text", return_tensors="pt")).logits.shape[0]
        1
    """
    with reading(Path(base_folder)):
        digest = _read_configuration(Path(base_folder))["digest"]
    with reading(Path(adapter_folder)), quiet_peft():
        check_binding(Path(adapter_folder), digest)
        return read_adapter(load_base(base_folder, **options), Path(adapter_folder))


def _read_configuration(folder: Path) -> dict:
    """`configuration.json` of a packed base, checked against its digest."""
    for name in (CONFIGURATION, PACKED, REST, "config.json"):
        if not (folder / name).is_file():
            raise CoaloraError(
                f"There is no {name} in {folder}, which is no packed base",
                remedy="Name the folder `base` of an export; export.formats has to hold packed for it",
            )
    content = read_json(folder / CONFIGURATION)
    if configuration_digest(content) != content["digest"]:
        raise CoaloraError(
            f"{CONFIGURATION} of {folder} names the digest {content['digest']}, and has "
            f"{configuration_digest(content)}",
            remedy="Export the base again",
        )
    return content
