"""Engines of devices: an export run where it will run, for `coalora verify` and for measuring how near it is.

Each gives the log-probabilities of the next token after every token of a text, base and adapter together. An engine is
a package that need not be installed (`pip install 'coalora[engines]'`); scheme and format need none of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from coalora.errors import CoaloraError
from coalora.export.base import load_adapted, load_base
from coalora.export.formats import EXPORT_FORMATS
from coalora.files import read_json
from coalora.quant.gptq.solver import process_state_kept
from coalora.trust import require_trust


@dataclass(frozen=True)
class Engine:
    """Runner of a format.

    Attributes:
        package: that is imported.
        run: log-probabilities (n, V) float32 after each of n tokens, of the format's folder.
        extra: of this package, that installs it.
    """

    package: str
    run: Callable[[Path, Sequence[int]], Tensor]
    extra: str = "engines"

    @property
    def installed(self) -> bool:
        return find_spec(self.package) is not None


def log_probabilities(export: Path, name: str, ids: Sequence[int]) -> Tensor:
    """Log-probabilities (n, V) of the token after each of `ids` (n,), by the engine of format `name`.

    Args:
        export: the folder that `coalora.export_for` wrote.

    Raises:
        CoaloraError: the format has no engine here, or its package is not installed.

    Example:
        >>> from coalora import export_for
        >>> from coalora.export.engines import log_probabilities
        >>> made = export_for(bundle, folder / "run", bits=3.0, base=base_folder)
        >>> log_probabilities(folder / "run", "packed", [1, 2, 3]).shape[0]
        3
    """
    if name not in ENGINES:
        raise CoaloraError(f"Format {name} has no engine to run it", remedy=f"Name one of {', '.join(ENGINES)}")
    engine = ENGINES[name]
    if not engine.installed:
        raise CoaloraError(
            f"Format {name} is run by {engine.package}, which is not installed",
            remedy=f"Install it with pip install 'coalora[{engine.extra}]'",
        )
    return engine.run(export / EXPORT_FORMATS[name].folder, ids)


@torch.no_grad()
def _packed(folder: Path, ids: Sequence[int]) -> Tensor:
    adapter = folder.parent / EXPORT_FORMATS["peft"].folder
    trusted = "auto_map" in read_json(folder / "config.json")
    if trusted:
        require_trust(f"The base in {folder} runs code that came with its checkpoint")
    if adapter.is_dir():
        model: PreTrainedModel | PeftModel = load_adapted(folder, adapter, trust_remote_code=trusted)
    else:
        model = load_base(folder, trust_remote_code=trusted)
    logits = model(input_ids=torch.tensor([list(ids)], device=model.device)).logits
    return _of(logits.reshape(-1, logits.shape[-1]))  # one row of a classifier


@torch.no_grad()
def _compressed_tensors(folder: Path, ids: Sequence[int]) -> Tensor:
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    base(torch.zeros(1, 1, dtype=torch.long))  # compressed-tensors unpacks the weights at the first call
    model = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
    return _of(model(input_ids=torch.tensor([list(ids)])).logits[0])


@torch.no_grad()
def _gptq(folder: Path, ids: Sequence[int]) -> Tensor:
    with torch.compiler.set_stance("force_eager"):  # each layer would be compiled, for a text
        return _of(open_gptq(folder)(input_ids=torch.tensor([list(ids)])).logits[0])


def open_gptq(folder: Path) -> PeftModel:
    """A pair in format `gptq` in GPTQModel with its torch kernel, on the CPU."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # some defaults raise on machines of two cores
    with process_state_kept():
        from logbar import LogBar

        LogBar.shared().setLevel("ERROR")  # its own logger, which tells every module's progress
        from gptqmodel import BACKEND, GPTQModel

        kernel = {"backend": BACKEND.GPTQ_TORCH, "device": "cpu", "dtype": torch.float16}
        base = GPTQModel.load(str(folder / "base"), **kernel).model
        return PeftModel.from_pretrained(base, str(folder / "adapter")).eval()


def _mlx(folder: Path, ids: Sequence[int]) -> Tensor:
    import mlx.core as mx
    import numpy as np
    from mlx_lm import load

    model, *_ = load(str(folder / "base"), adapter_path=str(folder / "adapter"))
    return _of(torch.from_numpy(np.array(model(mx.array([list(ids)])).astype(mx.float32)))[0])


class LlamaCpp:
    """llama.cpp on a pair in GGUF.

    Args:
        folder: with `model.gguf` and `adapter.gguf`.
        adapter: apply it.
    """

    def __init__(self, folder: Path, *, adapter: bool = True) -> None:
        import gguf
        import xllamacpp

        field = gguf.GGUFReader(folder / "model.gguf").fields["tokenizer.ggml.tokens"]
        words = [bytes(field.parts[at]).decode("utf-8", "replace") for at in field.data]
        self._size, self._printable = len(words), words.index("a")
        params = xllamacpp.CommonParams()
        params.model.path = str(folder / "model.gguf")
        params.n_ctx, params.n_parallel, params.n_gpu_layers = 512, 1, 0
        params.warmup, params.verbosity = False, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        if adapter:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(folder / "adapter.gguf"), 1.0)]
        self.server = xllamacpp.Server(params)

    def log_probabilities(self, ids: Sequence[int]) -> Tensor:
        """(n, V) after each of `ids`, at most 500."""
        return torch.stack([self.after(ids[: i + 1]) for i in range(len(ids))])

    def after(self, prompt: Sequence[int]) -> Tensor:
        """(V,) of the next token after a prompt."""
        # Text is forced out, or the engine would wait for the rest of a character; probabilities are from before.
        asked = {
            "prompt": list(prompt), "n_predict": 1, "n_probs": self._size, "logit_bias": [[self._printable, 1e4]],
        }  # fmt: skip
        answer = self.server.handle_completions(asked)
        content = (json.loads(answer) if isinstance(answer, str) else answer)["choices"][0]["logprobs"]["content"]
        found = torch.full((self._size,), torch.nan)
        for entry in content[0]["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        return found


def _llama_cpp(folder: Path, ids: Sequence[int]) -> Tensor:
    return LlamaCpp(folder).log_probabilities(ids)


def _of(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.float().cpu(), -1)


ENGINES = {
    "packed": Engine("coalora", _packed),
    "compressed-tensors": Engine("compressed_tensors", _compressed_tensors),
    "mlx": Engine("mlx_lm", _mlx),
    "gguf": Engine("xllamacpp", _llama_cpp),
    "gptq": Engine("gptqmodel", _gptq, "gptq"),
}
