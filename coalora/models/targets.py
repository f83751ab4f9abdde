"""Target layers: the linear layers of a model that are quantized and adapted.

A target layer is an `nn.Linear` or a `Conv1D` (GPT-2; its weight is stored in x out). Embeddings and heads stay in the
base's own precision. The counts N of the paper's models follow from `coalora.models.architectures`: RoBERTa-large 144,
Qwen2.5-1.5B 196, Llama-2-7B 224.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from coalora.errors import CoaloraError
from coalora.models.architectures import ARCHITECTURES
from coalora.recipes import Tie

ALL_LINEAR = "all-linear"  # PEFT's word
# Layers beside each other in a module that read the same input: engines multiply them as one.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class TargetLayer:
    """One quantized and adapted layer.

    Attributes:
        name: module name in the base model, as `named_modules` gives it.
        kind: the projection it is (`self_attn.q_proj`, ...): one embedding of theta for each kind.
        block: index of its transformer block; 0 for layers outside of blocks.
        shape: (out_features, in_features), whatever the storage order.
        transposed: True where the weight is stored in x out (`Conv1D`).
    """

    name: str
    kind: str
    block: int
    shape: tuple[int, int]
    transposed: bool

    @property
    def n_weights(self) -> int:
        return self.shape[0] * self.shape[1]

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict) -> TargetLayer:
        return cls(**{**fields, "shape": tuple(fields["shape"])})

    def matrix(self, weight: Tensor) -> Tensor:
        """The stored weight as out x in: a view, so that writing to it writes the weight."""
        return weight.T if self.transposed else weight


def tied_groups(layers: Sequence[TargetLayer], tie: Tie) -> NDArray[np.int64]:
    """Group (N,) of each layer, 0 to G-1 by first appearance: the layers of a group take one choice.

    Args:
        tie: none: each layer for itself; fused: query, key and value of an attention together, and gate and up of an
            MLP, which engines multiply as one.

    Example:
        >>> from coalora.models.targets import TargetLayer, tied_groups
        >>> names = ("attn.q_proj", "attn.k_proj", "attn.o_proj")
        >>> layers = [TargetLayer(f"layers.{i}.{name}", name, i, (8, 8), False) for i in (0, 1) for name in names]
        >>> tied_groups(layers, "fused").tolist()
        [0, 0, 1, 2, 2, 3]
    """
    keys = []
    for layer in layers:
        parent, _, own = layer.name.rpartition(".")
        fused = next((names for names in _FUSED if own in names), None) if tie == "fused" else None
        keys.append((parent, fused) if fused else layer.name)
    index = {key: group for group, key in enumerate(dict.fromkeys(keys))}
    return np.array([index[key] for key in keys], dtype=np.int64)


def head_modules(model: nn.Module) -> list[str]:
    """Modules of a classifier that are trained whole and saved with the adapter: what lies outside of its body, and
    what its checkpoint lacked (`coalora_missing` of `load_model`), such as a pooler. None of a language model.
    """
    ask = getattr(model, "get_output_embeddings", None)
    prefix = getattr(model, "base_model_prefix", "")
    if not (prefix and hasattr(model, prefix)) or (callable(ask) and ask() is not None):
        return []
    outside = [name for name, child in model.named_children() if name != prefix and list(child.parameters())]
    inside = [name for name in getattr(model, "coalora_missing", []) if name.startswith(f"{prefix}.")]
    return [*outside, *sorted({name.rpartition(".")[0] for name in inside})]


def other_tensors(model: nn.Module, targets: Iterable[str], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """All tensors of a model but the weights of the layers `targets`, each once (not a tied one's second name).

    Args:
        dtype: type of the floating ones where it is smaller and holds their values exactly, as it does for a 16-bit
            checkpoint computed in float32; the others, and all for None, keep the model's.
    """
    weights = {f"{name}.weight" for name in targets}
    rest: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in weights or id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if dtype is not None and tensor.is_floating_point() and dtype.itemsize < tensor.dtype.itemsize:
            smaller = tensor.detach().to(dtype)
            tensor = smaller if tensor.is_meta or torch.equal(smaller.to(tensor.dtype), tensor) else tensor
        rest[name] = tensor.detach()
    return rest


def find_target_layers(model: nn.Module, target_modules: Sequence[str] | str | None = None) -> list[TargetLayer]:
    """The target layers of `model`, in the order of `named_modules`.

    Args:
        model: a transformers model (may be on the meta device: only names and shapes are read).
        target_modules: name suffixes or globs (`*.mlp.*`), or `all-linear` as in PEFT: every linear layer of the
            model's body, that is, none of its heads. None takes the list of a registered architecture and
            `all-linear` for any other.

    Raises:
        CoaloraError: no list of patterns; a pattern that matches nothing; a layer that is not linear; a classifier's
            head, which is trained whole; a layer whose weight is shared with another module (tied embeddings):
            quantizing it would change the other module as well; a model without linear layers.

    Example:
        >>> from transformers import OPTConfig
        >>> from coalora.models.loading import meta_model
        >>> from coalora.models.targets import find_target_layers
        >>> config = OPTConfig(hidden_size=64, word_embed_proj_dim=64, num_attention_heads=4, num_hidden_layers=2)
        >>> layers = find_target_layers(meta_model(config, "language-modeling"), "all-linear")
        >>> len(layers), layers[0].kind, layers[-1].block
        (12, 'self_attn.k_proj', 1)
    """
    if target_modules is None:
        model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
        target_modules = ARCHITECTURES[model_type].target_modules if model_type in ARCHITECTURES else ALL_LINEAR
    if target_modules == ALL_LINEAR:
        return _all_linear(model)
    if isinstance(target_modules, str) or not target_modules:
        raise CoaloraError(
            f"target_modules is {target_modules!r}",
            remedy="Give a list of name suffixes or globs such as ['q_proj', 'v_proj'], or 'all-linear'",
        )
    patterns = sorted(target_modules, key=len, reverse=True)
    used: set[str] = set()
    heads = head_modules(model)
    layers: list[TargetLayer] = []
    for name, module in model.named_modules():
        kind = next((p for p in patterns if matches(name, p)), None)
        if kind is None:
            continue
        is_glob = any(c in kind for c in "*?[")
        if not isinstance(module, nn.Linear | Conv1D):
            if is_glob:  # a glob may well cover containers on its way to the layers
                continue
            raise CoaloraError(
                f"{name} is {type(module).__name__}, not a linear layer",
                remedy=f"Make the pattern {kind!r} of target_modules narrower",
            )
        if any(name == head or name.startswith(f"{head}.") for head in heads):
            raise CoaloraError(
                f"{kind!r} of target_modules takes {name}, which is trained whole as part of the classifier's head",
                remedy="Name layers of the model's body, or write all-linear for all of them",
            )
        used.add(kind)
        layers.append(_layer(model, name, module, name.rsplit(".", 1)[-1] if is_glob else kind))
    unused = [p for p in target_modules if p not in used]
    # The longest match wins, so a shorter pattern may lose all its layers to longer ones: that is fine.
    unused = [p for p in unused if not any(matches(layer.name, p) for layer in layers)]
    if unused or not layers:
        names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
        raise CoaloraError(
            f"{', '.join(map(repr, unused or target_modules))} of target_modules matches no linear layer",
            remedy=f"Give suffixes or globs of names such as {', '.join(names[:4])}, or leave target_modules out",
        )
    owners = _names_by_weight(model)
    for layer in layers:
        if len(shared := owners[id(model.get_submodule(layer.name).get_parameter("weight"))]) > 1:
            raise CoaloraError(
                f"{' and '.join(shared)} share one tensor, and quantizing it would change both",
                remedy=f"Leave {layer.name} out of target_modules, or untie the model's embeddings",
            )
    return layers


def _all_linear(model: nn.Module) -> list[TargetLayer]:
    """Every linear layer of the body whose weight is its own; heads are what lies outside, or what gives the output."""
    prefix = getattr(model, "base_model_prefix", "")
    body = f"{prefix}." if prefix and hasattr(model, prefix) else ""
    ask = getattr(model, "get_output_embeddings", None)
    head, heads = ask() if callable(ask) else None, head_modules(model)
    layers = [
        _layer(model, name, module, _kind(model, name))
        for name, module in model.named_modules()
        # Exact types: a subclass may be multiplied elsewhere than in its own forward pass, past the adapter.
        if type(module) in (nn.Linear, Conv1D) and name.startswith(body) and module is not head and name not in heads
    ]
    names = _names_by_weight(model)
    layers = [layer for layer in layers if len(names[id(model.get_submodule(layer.name).get_parameter("weight"))]) == 1]
    if not layers:
        raise CoaloraError(
            f"{type(model).__name__} has no linear layer in its body", remedy="Name layers in target_modules"
        )
    return layers


def _layer(model: nn.Module, name: str, module: nn.Module, kind: str) -> TargetLayer:
    transposed = isinstance(module, Conv1D)
    rows, columns = module.get_parameter("weight").shape
    block, _ = _position(model, name)
    return TargetLayer(name, kind, block, (columns, rows) if transposed else (rows, columns), transposed)


def _position(model: nn.Module, name: str) -> tuple[int, str]:
    """Index in the first module list on the way to a module and its name from there on; else 0 and all of it."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit() and isinstance(model.get_submodule(".".join(parts[:i])), nn.ModuleList):
            return int(part), ".".join(parts[i + 1 :])
    return 0, name


def _kind(model: nn.Module, name: str) -> str:
    """Name inside of a block without numbers: the experts of a mixture are of one kind."""
    _, inside = _position(model, name)
    return re.sub(r"\.\d+(?=\.)", "", inside)


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern means a module: a glob its whole name, anything else a suffix of whole parts."""
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return name == pattern or name.endswith("." + pattern)


def _names_by_weight(model: nn.Module) -> dict[int, list[str]]:
    """Names of every parameter by its identity: more than one where it is tied."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names
