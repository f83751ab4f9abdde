"""Before any test imports torch or Prefect: what the environment must not decide.

One thread a process: files run on two processes, and tiny matrices on two threads lose more to each other than they
gain. And no servers, stores or credentials of the user's, who may have sourced a stack's variables in this terminal
(`.coalora/stack/env`): tests that need any start their own.
"""

import gc
import multiprocessing
import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests import preloaded, shared

if TYPE_CHECKING:
    from tests.s3_server import FaultProxy

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # no test is for a hub, and one that does not answer is asked for half a minute
for _name in list(os.environ):
    if _name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI") or _name.startswith(("AWS_", "COALORA_")):
        del os.environ[_name]
# A shell that starts the suite in the background has it ignore these, and tests send them to what they start.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)
shared.begin()
gc.disable()  # while torch and the others are imported: what they leave is never garbage
# Processes that tests and what they call start by multiprocessing begin with the libraries imported, and theirs too.
os.environ["PRELOADED_PYTHON"] = str(preloaded.python(shared.folder() / f"bin-{os.getpid()}"))
multiprocessing.set_executable(os.environ["PRELOADED_PYTHON"])


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    shared.end()


@pytest.fixture(scope="session")
def s3() -> "Iterator[FaultProxy]":
    """One S3 server for all tests of a session, behind a proxy that makes faults."""
    from tests.s3_server import fault_proxy, s3_server

    with s3_server() as backend, fault_proxy(backend) as proxy:
        yield proxy


# The longest files, the longest first: one that is begun last would have the other process wait for it at the end.
_LONG_FIRST = (
    "e2e/test_stack.py", "pipeline/orchestration/test_server.py", "faults/test_kills.py",
    "flows/test_dvc.py", "flows/test_pipeline.py", "flows/test_caching.py", "docs/test_notebook.py",
    "flows/test_upload.py", "docs/test_site.py",
    "pipeline/workers/test_pool.py", "faults/test_interrupted.py", "faults/test_wrong_inputs.py",
    "faults/test_first_runs.py", "infra/test_stack.py", "pipeline/stages/test_checkpoints.py",
    "pipeline/versioning/test_sets.py", "coalora/test_wheel.py", "coalora/export/test_bundle.py",
    "coalora/quant/kernels/test_triton.py", "faults/test_evil_pages.py", "pipeline/store/test_shared.py",
    "flows/test_finished.py", "flows/test_costs.py", "pipeline/stages/test_runner.py", "test_extending.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {f"tests/{name}": place for place, name in enumerate(_LONG_FIRST)}
    items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))
