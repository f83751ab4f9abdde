"""Work of mapped stages in another process, and the base of the pools that send it there.

A runner calls the stage's function through a pool (`pipeline.stages.stage.Call.pool`); locks, records, Prefect's task
runs and their concurrency limits stay with the runner, so that a worker needs the code and the store and no Prefect
server. Each worker takes one call at a time and keeps its model loaded for the next (`pipeline.inputs.adapted`).

Dask and Ray are used as they are, and not through prefect-dask and prefect-ray: `dvc repro` runs the same stages
without Prefect, and a task run of theirs would need the server's address on every worker.
"""

import logging
import os
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from coalora.errors import CoaloraError
from pipeline.environment import STORE_VARIABLE
from pipeline.stages.checkpoints import checkpoint_every, checkpoint_seconds
from pipeline.stages.keys import artifacts_in
from pipeline.stages.stage import Stage
from pipeline.store.artifacts import Artifact
from pipeline.store.store import current_store, default_store

# Of this worker:
_last_stage: list[str] = []


def work(
    stage: Stage,
    key: str,
    inputs: dict[str, Any],
    environment: Mapping[str, str],
    threads: int,
    checkpoint_seconds: float | None,
) -> Artifact:
    """What a worker does: one call of a stage's function; the artifact is in the store when it returns.

    Args:
        key: the runner's cache key of the call.
        environment: variables that the worker takes over.
        threads: of torch's operations.
        checkpoint_seconds: between two checkpoints of training.

    Raises:
        CoaloraError: this worker's code or packages are others than the runner's, or an input cannot be read here.
    """
    os.environ.update(environment)
    if stage.key(inputs) != key:
        raise CoaloraError(
            f"A worker has other code or packages than the run (stage {stage.name!r}; "
            f"Python {sys.version.split()[0]} in {os.getcwd()})",
            remedy="Give the workers this checkout and its environment, and start them again",
        )
    store = default_store()
    for name, artifact in artifacts_in(inputs):
        if found := store.problems(artifact):
            raise CoaloraError(
                f"A worker cannot read the run's {name} ({found[0]})",
                remedy=f"Set {STORE_VARIABLE}, or COALORA_HOME to a folder that all machines see",
            )
    import torch

    from pipeline.inputs.adapted import release_models

    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    if _last_stage[:] != [stage.name]:
        release_models()  # kept for the next call of the same stage, and not beside the model of another
        _last_stage[:] = [stage.name]
    with checkpoint_every(checkpoint_seconds):
        made = stage.measured(inputs)
    store.share(made)
    return made


class WorkerPool(ABC):
    """Workers that start with the first call and end with `close`; a `pipeline.stages.stage.Pool`. Used from several
    threads.

    Args:
        workers: calls at a time.
        threads: of torch in each worker; by default this process's, dealt out among the workers of this machine.
        address: of the cluster's scheduler; without it a cluster of `workers` processes is started on this machine.
    """

    def __init__(self, workers: int, *, threads: int | None = None, address: str | None = None) -> None:
        import torch

        self.workers, self.address = workers, address
        self.threads = threads or max(1, torch.get_num_threads() // (1 if address else workers))
        self._guard = threading.Lock()
        self._started = False

    def run(self, stage: Stage, key: str, inputs: dict[str, Any]) -> Artifact:
        with self._guard:
            if not self._started:
                self._start()
                self._started = True
        names = (STORE_VARIABLE,) if self.address else (STORE_VARIABLE, "COALORA_HOME")
        environment = {name: os.environ[name] for name in names if name in os.environ}
        made = self._call(stage, key, inputs, environment, self.threads, checkpoint_seconds())
        if found := current_store().problems(made):
            raise CoaloraError(
                f"What a worker has made cannot be read here ({found[0]})",
                remedy=f"Set {STORE_VARIABLE}, or COALORA_HOME to a folder that all machines see",
            )
        return made

    def close(self) -> None:
        """End the workers, and with them their models."""
        with self._guard:
            if self._started:
                self._stop()
                self._started = False

    @abstractmethod
    def _start(self) -> None: ...

    @abstractmethod
    def _call(self, *call: Any) -> Artifact:
        """`work(*call)` on a worker."""

    @abstractmethod
    def _stop(self) -> None: ...


def log_here(level: int) -> None:
    """Progress lines of a worker on its standard error."""
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s  worker %(process)d  %(message)s", datefmt="%H:%M:%S"
    )
    logging.getLogger("coalora").setLevel(level)


def lost(what: str, error: BaseException) -> RuntimeError:
    """The error of a call whose worker went away."""
    return RuntimeError(
        f"{what} ended before it answered ({type(error).__name__}: {error}); it was killed, or ran out of memory. "
        "Finished shards are kept: run again, with fewer evaluation.workers if memory is short"
    )
