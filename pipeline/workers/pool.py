"""Choice of the workers that mapped stages run on, by `evaluation.runner`."""

from importlib.util import find_spec
from typing import Literal

from coalora.errors import CoaloraError
from pipeline.workers.worker import WorkerPool

RunnerKind = Literal["threads", "processes", "dask", "ray"]


def open_pool(kind: RunnerKind, workers: int, *, address: str | None = None) -> WorkerPool | None:
    """A pool of a kind; None for threads, which need none."""
    check_runner(kind)
    if kind == "processes":
        from pipeline.workers.processes import ProcessWorkers as Workers
    elif kind == "dask":
        from pipeline.workers.dask_pool import DaskWorkers as Workers  # type: ignore[assignment]
    elif kind == "ray":
        from pipeline.workers.ray_pool import RayWorkers as Workers  # type: ignore[assignment]
    else:
        return None
    return Workers(workers, address=address)


def check_runner(kind: RunnerKind) -> None:
    """Refuse a runner whose package is not installed, before anything runs."""
    package = {"dask": "distributed", "ray": "ray"}.get(kind)
    if package is not None and find_spec(package) is None:
        raise CoaloraError(
            f"evaluation.runner {kind!r} needs the package {package}, which is not installed",
            remedy=f"Run pip install 'coalora[{kind}]', or set evaluation.runner=processes",
        )
