"""Target layers: which linear layers of a model are quantized and adapted.

A target layer is an `nn.Linear` or a GPT-2 `Conv1D` (whose weight is stored in x out). The families below list the
projections inside the transformer blocks; embeddings and heads stay in the base's own precision. The counts N of the
paper's models follow: RoBERTa-large 144, Qwen2.5-1.5B 196, Llama-2-7B 224.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from coalora.errors import CoaloraError

_DECODER = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_ENCODER = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
# `model_type` of the config -> name suffixes; the longest that matches is the layer's kind.
FAMILIES: dict[str, tuple[str, ...]] = {
    "bert": _ENCODER,
    "roberta": _ENCODER,
    "llama": _DECODER,
    "mistral": _DECODER,
    "qwen2": _DECODER,
    "qwen3": _DECODER,
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
}


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


def find_target_layers(model: nn.Module, target_modules: Sequence[str] | None = None) -> list[TargetLayer]:
    """The target layers of `model`, in the order of `named_modules`.

    Args:
        model: a transformers model (may be on the meta device: only names and shapes are read).
        target_modules: name suffixes or globs (`*.mlp.*`); None takes the family's list.

    Raises:
        CoaloraError: unknown family without `target_modules`; no list of patterns; a pattern that matches nothing; a
            layer that is not linear; a layer whose weight is shared with another module (tied embeddings):
            quantizing it would change the other module as well.
    """
    if target_modules is None:
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if model_type not in FAMILIES:
            raise CoaloraError(
                "target layers are found by default only for known model families",
                got=f"model_type {model_type!r}",
                expected=", ".join(sorted(FAMILIES)),
                remedy="set target_modules to name suffixes such as ['q_proj', 'v_proj']",
            )
        target_modules = FAMILIES[model_type]
    if isinstance(target_modules, str) or not target_modules:
        raise CoaloraError(
            "target_modules is a list of name suffixes or globs, not empty",
            got=repr(target_modules),
            expected="for example ['q_proj', 'v_proj']",
            remedy="leave it out to take the family's default",
        )
    patterns = sorted(target_modules, key=len, reverse=True)
    used: set[str] = set()
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
                "a target layer must be a linear layer",
                got=f"{name} is {type(module).__name__}",
                expected="torch.nn.Linear or transformers Conv1D",
                remedy=f"make the pattern {kind!r} of target_modules narrower",
            )
        used.add(kind)
        transposed = isinstance(module, Conv1D)
        rows, columns = module.weight.shape
        layers.append(
            TargetLayer(
                name=name,
                kind=name.rsplit(".", 1)[-1] if is_glob else kind,
                block=next((int(part) for part in name.split(".") if part.isdigit()), 0),
                shape=(columns, rows) if transposed else (rows, columns),
                transposed=transposed,
            )
        )
    unused = [p for p in target_modules if p not in used]
    # The longest match wins, so a shorter pattern may lose all its layers to longer ones: that is fine.
    unused = [p for p in unused if not any(matches(layer.name, p) for layer in layers)]
    if unused or not layers:
        names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
        raise CoaloraError(
            "every pattern of target_modules must match a linear layer",
            got=f"no match for {', '.join(map(repr, unused or target_modules))}",
            expected=f"suffixes or globs of names such as {', '.join(names[:4])}",
            remedy="correct target_modules, or leave it out to take the family's default",
        )
    _refuse_shared_weights(model, layers)
    return layers


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern means a module: a glob its whole name, anything else a suffix of whole parts."""
    if any(c in pattern for c in "*?["):
        return fnmatch.fnmatchcase(name, pattern)
    return name == pattern or name.endswith("." + pattern)


def _refuse_shared_weights(model: nn.Module, layers: Sequence[TargetLayer]) -> None:
    owners: dict[int, list[str]] = {}
    for module_name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(f"{module_name}.{parameter_name}")
    for layer in layers:
        shared = owners[id(model.get_submodule(layer.name).weight)]
        if len(shared) > 1:
            raise CoaloraError(
                "a target layer must own its weight: quantizing a tied weight changes the other module too",
                got=" and ".join(shared) + " share one tensor",
                expected="layers inside the transformer blocks, or an untied head",
                remedy=f"leave {layer.name} out of target_modules, or untie the model's embeddings",
            )
