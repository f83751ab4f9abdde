"""Workers of a Ray cluster: of the one at `address`, or one on this machine. Extra `[ray]`.

Each worker is an actor, since Ray does not promise to give a task the process that has its model. An actor of a GPU run
takes one GPU.
"""

import logging
import os
import queue
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from coalora.errors import CoaloraError
from pipeline.store.artifacts import Artifact
from pipeline.workers.worker import WorkerPool, log_here, lost, work


class _Worker:
    def __init__(self, level: int) -> None:
        log_here(level)

    def work(self, *call: Any) -> Artifact:
        return work(*call)


class RayWorkers(WorkerPool):
    """`workers` actors; one that is lost is started again and its call repeated."""

    def _start(self) -> None:
        import torch

        self._ours = not ray.is_initialized()
        if self._ours:
            # What is imported from this checkout is found by actors of this machine; a cluster's has its own checkout.
            local = {} if self.address else {"num_cpus": self.workers, "include_dashboard": False}
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default; the run waits for nothing else
            try:
                ray.init(address=self.address or "local", log_to_driver=True, logging_level=logging.ERROR, **local)
            except (ConnectionError, ValueError) as error:
                raise CoaloraError(
                    f"No Ray cluster answers at evaluation.address {self.address} ({error})",
                    remedy="Start one (ray start --head; auto, or ray://HOST:10001), or leave evaluation.address out",
                ) from error
        level = logging.getLogger("coalora").getEffectiveLevel()
        needs = {"num_cpus": 1, "num_gpus": 1 if torch.cuda.is_available() else 0}
        actor = ray.remote(max_restarts=3, max_task_retries=3, **needs)(_Worker)
        self._idle: queue.Queue[Any] = queue.Queue()
        for _ in range(self.workers):
            self._idle.put(actor.remote(level))

    def _call(self, *call: Any) -> Artifact:
        worker = self._idle.get()
        try:
            return ray.get(worker.work.remote(*call))
        except RayTaskError as error:
            raise error.cause from None  # what the function raised
        except RayActorError as error:
            raise lost("a Ray worker", error) from error
        finally:
            self._idle.put(worker)

    def _stop(self) -> None:
        while not self._idle.empty():
            ray.kill(self._idle.get())
        if self._ours:
            ray.shutdown()
