"""Results of other packages that ours are compared with, computed where these are installed.

They lie in `.venv/oracles`, beside the environment and not in it, because PEFT imports bitsandbytes wherever it finds
it, and on some processors that writes to stderr of every command. So these functions run in a process of their own,
through the fixture `oracle`; tests that use it are marked `oracles`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

Oracle = Callable[..., Any]
FOLDER = Path(sys.prefix) / "oracles"


@contextmanager
def oracle_process() -> Iterator[Oracle]:
    """A function `oracle(function, *arguments)` that calls one of this module in a process which finds the packages."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_find_packages) as process:
        yield lambda function, *arguments: process.submit(function, *arguments).result()


def _find_packages() -> None:
    sys.path.insert(0, str(FOLDER))


def nf4_table() -> np.ndarray:
    """(16,) code book of NF4 in bitsandbytes."""
    import bitsandbytes.functional as bnb

    return bnb.get_4bit_type("nf4", device="cpu").numpy()


def nf4_quantized(weight: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Packed codes, high half first, and the scales of the blocks by bitsandbytes."""
    import bitsandbytes.functional as bnb

    packed, state = bnb.quantize_4bit(
        torch.as_tensor(weight), blocksize=block_size, quant_type="nf4", quant_storage=torch.uint8
    )
    return packed.view(-1).numpy(), state.absmax.numpy()


def non_dominated(Y: np.ndarray, deduplicate: bool) -> np.ndarray:
    """(n,) mask of BoTorch, all objectives minimised."""
    from botorch.utils.multi_objective.pareto import is_non_dominated

    return is_non_dominated(torch.as_tensor(Y), maximize=False, deduplicate=deduplicate).numpy()


def hypervolume(Y: np.ndarray, ref_point: np.ndarray) -> float:
    """Hypervolume of BoTorch, all objectives minimised."""
    from botorch.utils.multi_objective.hypervolume import Hypervolume

    return Hypervolume(ref_point=-torch.as_tensor(ref_point)).compute(-torch.as_tensor(Y))


def expected_improvement(
    mean: np.ndarray, sigma: np.ndarray, cost: np.ndarray, front: np.ndarray, ref_point: np.ndarray
) -> list[float]:
    """Analytic EHVI of BoTorch for losses N(mean, sigma^2) at costs of vanishing variance, both minimised."""
    from botorch.acquisition.multi_objective.analytic import ExpectedHypervolumeImprovement
    from botorch.utils.multi_objective.box_decompositions.non_dominated import FastNondominatedPartitioning
    from botorch.utils.testing import MockModel, MockPosterior

    reference = torch.as_tensor(-ref_point)
    partitioning = FastNondominatedPartitioning(ref_point=reference, Y=torch.as_tensor(-front))
    found = []
    for m, s, c in zip(mean, sigma, cost, strict=True):
        posterior = MockPosterior(mean=torch.tensor([[-m, -c]]), variance=torch.tensor([[s**2, 1e-14]]))
        acquisition = ExpectedHypervolumeImprovement(MockModel(posterior), reference.tolist(), partitioning)
        found.append(float(acquisition(torch.zeros(1, 1, 1))))
    return found
