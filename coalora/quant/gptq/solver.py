"""gptqmodel's own GPTQ (Frantar et al. 2022, arXiv 2210.17323), run on one weight and a Hessian collected before.

gptqmodel feeds its `GPTQ` object with batches and accumulates H = 2 E[x x^T] from them. Here H is set instead, so
that one calibration pass serves every choice of bits and groups and no model is loaded through gptqmodel. All
arithmetic (ranges, damping, Cholesky factor, column loop) is gptqmodel's; only the factor is kept between choices
that it does not depend on.

Settings: gptqmodel's defaults (damping 0.05, group-aware reordering of columns, which leaves groups contiguous and so
costs no index) except for ranges: gptqmodel takes them from the extremes of a group, or searches them by least
squares (`mse=2`). The search more than halves the error at 2 bits and gains a tenth at 4, and nothing at 8, where it
is left out.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from coalora.errors import CoaloraError
from coalora.quant.scheme import check_weight

_VERSIONS = ((7, 4), (7, 7))  # from, below
_INSTALL = "Install it with `pip install 'coalora[gptq]'`"
_SEARCHED_BITS = (2, 3, 4)


@dataclass(frozen=True)
class Solution:
    """What GPTQ made of a weight (out, in) in G = ceil(in / group_size) groups a row: w^ = scale (code - zero).

    Attributes:
        codes: uint8 (out, in).
        scales: float32 (out, G).
        zeros: uint8 (out, G).
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor


def check_installed() -> None:
    """Look for gptqmodel without importing it.

    Raises:
        CoaloraError: it is absent or of another version, or optimum is absent, without which PEFT refuses to wrap
            any layer where gptqmodel is installed.
    """
    absent = [name for name in ("gptqmodel", "optimum") if find_spec(name) is None]
    if absent:
        raise CoaloraError(
            f"Scheme 'gptq' needs {' and '.join(absent)}, not installed here",
            remedy=_INSTALL,
        )
    try:
        found = version("gptqmodel")
    except PackageNotFoundError:  # on the path without metadata: whatever it is, it was not installed as declared
        found = "no version"
    low, high = _VERSIONS
    parts = found.split(".")
    if not (all(part.isdigit() for part in parts[:2]) and low <= tuple(map(int, parts[:2])) < high):
        raise CoaloraError(
            f"Scheme 'gptq' needs gptqmodel >={low[0]}.{low[1]},<{high[0]}.{high[1]} and found {found}",
            remedy=_INSTALL,
        )


class LayerSolver:
    """Solves one layer for any choice; holds the Hessian's factor of every group size that was asked for.

    Args:
        weight: (out, in), floating point and finite; not written to.
        hessian: E[x x^T], float32 (in, in).

    Raises:
        CoaloraError: gptqmodel is absent; a weight or Hessian of the wrong shape, or not finite.
    """

    def __init__(self, weight: Tensor, hessian: Tensor) -> None:
        check_installed()
        check_weight(weight)
        if hessian.shape != (weight.shape[1], weight.shape[1]):
            raise CoaloraError(
                f"A Hessian of shape {tuple(hessian.shape)} is not one of {weight.shape[1]} input features",
                remedy="Calibrate with this model and these layers",
            )
        self._weight = weight.detach().to(torch.float32).contiguous()
        self._hessian = hessian.to(self._weight.device, torch.float32)
        for name, tensor in (("weight", self._weight), ("Hessian", self._hessian)):
            if not bool(torch.isfinite(tensor).all()):
                raise CoaloraError(
                    f"The {name} of a layer to quantize has entries that are NaN or infinite",
                    remedy="Repair the checkpoint, or calibrate with other samples",
                )
        self._factors: dict[int, tuple[Tensor, float]] = {}

    def solve(self, bits: int, group_size: int, *, sym: bool) -> Solution:
        """Run GPTQ; about 0.1 s for 384 x 384 on one core without a search of ranges, 0.3 s with it.

        Raises:
            CoaloraError: a Hessian that no damping makes positive definite, or a gptqmodel that works differently.
        """
        GPTQ, GPTQConfig = _gptqmodel()
        config = GPTQConfig(
            bits=bits,
            group_size=group_size,
            sym=sym,
            act_group_aware=True,
            mse=2.0 if bits in _SEARCHED_BITS else 0.0,
            fallback=None,  # its default falls back to plain rounding and only logs that
        )
        rows, columns = self._weight.shape
        module = nn.Linear(columns, rows, bias=False, device="meta")
        module.weight = nn.Parameter(self._weight, requires_grad=False)
        task = GPTQ(module, config)
        task.quantizer.configure(perchannel=True)
        task.H = self._hessian * 2  # a new tensor: it is permuted and damped in place
        task.nsamples = 1  # enters nothing but the loss that gptqmodel logs
        asked = False

        def factor(H: Tensor) -> tuple[Tensor, float]:
            nonlocal asked
            asked = True
            if group_size not in self._factors:  # columns are ordered by groups
                found, damp = GPTQ.hessian_inverse(task, H)
                if found is None:
                    raise CoaloraError(
                        "No damping makes a layer's Hessian positive definite",
                        remedy="Calibrate with more or other samples",
                    )
                self._factors[group_size] = found, damp
            return self._factors[group_size]

        task.hessian_inverse = factor
        quantized, scales, zeros, groups, *_ = task.quantize()
        expected = (rows, -(-columns // group_size))
        in_order = torch.equal(groups.cpu(), torch.arange(columns, dtype=groups.dtype) // group_size)
        if not asked or not in_order or scales.shape != expected or zeros.shape != expected:
            raise CoaloraError(
                f"gptqmodel {version('gptqmodel')} works differently: Hessian read {asked}, columns kept in order "
                f"{in_order}, scales of shape {tuple(scales.shape)}, not {expected}",
                remedy=_INSTALL,
            )
        if not bool(torch.isfinite(quantized).all()):
            raise CoaloraError("GPTQ's result has NaN or infinite entries", remedy="Calibrate with more samples")
        by_column = groups.to(scales.device, torch.int64)
        codes = torch.round(quantized / scales[:, by_column]) + zeros[:, by_column]
        return Solution(codes.to(torch.uint8), scales.clone(), zeros.to(torch.uint8))


@lru_cache(maxsize=1)
def _gptqmodel() -> tuple[Any, Any]:
    """Its `GPTQ` and `GPTQConfig`, imported on first use (2 s)."""
    check_installed()
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # some defaults raise on machines of two cores
    with process_state_kept():
        from logbar import LogBar

        LogBar.shared().setLevel("ERROR")  # its own logger, which prints a banner and every module's progress
        from gptqmodel.quantization.config import GPTQConfig
        from gptqmodel.quantization.gptq import GPTQ
    return GPTQ, GPTQConfig


@contextmanager
def process_state_kept() -> Iterator[None]:
    """Undo what importing gptqmodel does to everyone else: it moves HF_HOME and sets other variables, gives the root
    logger a handler, and replaces safetensors' `save_file`."""
    environ, root = dict(os.environ), logging.getLogger()
    handlers, level, save_file = list(root.handlers), root.level, safetensors.torch.save_file
    try:
        yield
    finally:
        for name in os.environ.keys() - environ.keys():
            del os.environ[name]
        os.environ.update(environ)
        root.handlers[:] = handlers
        root.setLevel(level)
        safetensors.torch.save_file = save_file
