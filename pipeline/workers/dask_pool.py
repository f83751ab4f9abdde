"""Workers of a Dask cluster: of the scheduler at `address`, or of a cluster on this machine. Extra `[dask]`.

On several machines start one worker for each GPU, from this checkout and its environment, with one thread each:

    dask worker tcp://scheduler:8786 --nthreads 1
"""

import logging
from typing import Any

from distributed import Client, LocalCluster
from distributed.scheduler import KilledWorker

from coalora.errors import CoaloraError
from pipeline.store.artifacts import Artifact
from pipeline.workers.worker import WorkerPool, log_here, lost, work

CONNECT_SECONDS = 30


class DaskWorkers(WorkerPool):
    """Calls go to Dask's workers; one that is lost is run again on another."""

    def _start(self) -> None:
        self._cluster: LocalCluster | None = None
        if self.address is None:
            # No dashboard: it needs bokeh, and a port.
            self._cluster = LocalCluster(
                n_workers=self.workers, threads_per_worker=1, dashboard_address=None, silence_logs=logging.ERROR
            )
        try:
            self._client = Client(self._cluster or self.address, timeout=CONNECT_SECONDS)
        except OSError as error:
            raise CoaloraError(
                f"No Dask scheduler answers at evaluation.address {self.address} ({error})",
                remedy="Start one (dask scheduler; tcp://HOST:8786), or leave evaluation.address out",
            ) from error
        # Before the first call, since workers that come later would not say what they do.
        self._client.register_worker_callbacks(_begin)

    def _call(self, *call: Any) -> Artifact:
        try:
            # `resources` are left to the cluster; one thread a worker is what keeps it to one call at a time.
            return self._client.submit(work, *call, pure=False).result()
        except KilledWorker as error:
            raise lost("every Dask worker that tried", error) from error

    def _stop(self) -> None:
        self._client.close()
        if self._cluster is not None:
            self._cluster.close()


def _begin() -> None:
    log_here(logging.INFO)
