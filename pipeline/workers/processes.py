"""Worker processes of this machine. Each GPU run gives them the visible GPUs in turn."""

import logging
import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from pipeline.store.artifacts import Artifact
from pipeline.workers.worker import WorkerPool, log_here, lost, work


class ProcessWorkers(WorkerPool):
    """`workers` processes, started anew (torch does not survive a fork) and gone when this process is."""

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        level = logging.getLogger("coalora").getEffectiveLevel()
        self._pool = ProcessPoolExecutor(
            self.workers,
            mp_context=context,
            initializer=_begin,
            initargs=(context.Value("i", 0), visible_gpus(), level),
        )

    def _call(self, *call: Any) -> Artifact:
        try:
            return self._pool.submit(work, *call).result()
        except BrokenProcessPool as error:
            self._stop()
            self._start()  # the next call gets new processes
            raise lost("a worker process", error) from error

    def _stop(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def visible_gpus() -> list[str]:
    """What `CUDA_VISIBLE_DEVICES` calls the GPUs of this process, without touching them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    return [str(index) for index in range(torch.cuda.device_count())]


def _begin(counter: Any, gpus: list[str], level: int) -> None:
    """In a new worker, before torch meets a GPU."""
    with counter.get_lock():
        index = counter.value
        counter.value += 1
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[index % len(gpus)]
    log_here(level)
    threading.Thread(target=_end_with_parent, name="coalora-parent", daemon=True).start()


def _end_with_parent() -> None:
    # A parent that was killed closes no queue: without this its workers would wait for work for ever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
