"""Work of many layers in threads: its order, its errors, and what an interrupt leaves."""

from __future__ import annotations

import threading
from contextvars import ContextVar

import pytest
import torch

from coalora.threads import each, n_threads

CPU = torch.device("cpu")


def test_results_keep_the_order_and_come_from_as_many_threads_as_torch_may_use(two_threads) -> None:
    both = threading.Barrier(2, timeout=30)

    def work(n: int) -> tuple[int, bool]:
        both.wait()
        return n, torch.is_grad_enabled()

    with torch.no_grad():
        assert each(work, [3, 1, 2, 0], n_threads(CPU)) == [(3, False), (1, False), (2, False), (0, False)]
    assert each(work, [3, 1], n_threads(CPU)) == [(3, True), (1, True)]


def test_a_gpu_is_fed_from_one_thread(two_threads) -> None:
    assert (n_threads(CPU), n_threads(torch.device("cuda"))) == (2, 1)
    ran = each(lambda n: threading.current_thread(), range(3), n_threads(torch.device("cuda")))
    assert set(ran) == {threading.main_thread()}


def test_work_sees_the_callers_context(two_threads) -> None:
    """Where Prefect looks for the task run that a log line or a progress bar belongs to."""
    variable = ContextVar("variable", default="nothing")
    token = variable.set("the caller's")
    assert each(lambda n: variable.get(), range(4), n_threads(CPU)) == ["the caller's"] * 4
    variable.reset(token)


@pytest.mark.parametrize("wait", [True, False])
def test_an_error_leaves_out_what_is_not_begun(two_threads, wait) -> None:
    begun, go = [], threading.Event()

    def work(n: int) -> None:
        begun.append(n)
        if n == 0:
            raise ValueError("the first")
        go.wait(30 if not wait else 0.2)

    with pytest.raises(ValueError, match="the first"):
        each(work, range(50), n_threads(CPU), wait=wait)
    assert len(begun) < 50
    go.set()
