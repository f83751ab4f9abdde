"""Data-parallel training: several processes, one model each, gradients averaged after every step.

Processes are set up by Accelerate (`accelerate launch`, or `spawn` below): NCCL between GPUs, Gloo between CPUs. Each
process takes its own examples. What they do with configurations is a choice:

`own`   each process draws its own configuration, so that a step is averaged over as many as there are processes; step t
        of process p draws what step t * W + p of a single process would.
`same`  all processes draw one configuration: W processes of batch b take the steps of one with batch W * b.

Gradients travel in one flat tensor. An expert that no process used in a step has no gradient, as with one process.
"""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import gather, reduce
from torch import Tensor, nn

from coalora.allocator import keep_freed_memory
from coalora.errors import CoaloraError
from coalora.files import read_tensors, write_tensors

Configurations = Literal["own", "same"]
Message = tuple[str, Any]

_RESULT = "result.safetensors"
_PATIENCE = 20.0  # seconds for processes that were told to stop
_stop = threading.Event()
_messages: Any = None


class Stopped(BaseException):
    """Training that was told to stop has stopped, at a step's boundary."""


def stop_asked() -> bool:
    """Whether this process, one of `spawn`'s, was told to stop."""
    return _stop.is_set()


def post(kind: str, content: Any) -> None:
    """Tell the process that called `spawn` something (JSON-able); nothing in any other process."""
    if _messages is not None:
        _messages.put((kind, content))


@dataclass(frozen=True)
class Parallel:
    """This process among W.

    Attributes:
        rank, world_size: p and W.
        configurations: `own` or `same`, see the module docstring.
    """

    rank: int = 0
    world_size: int = 1
    configurations: Configurations = "own"

    @classmethod
    def from_environment(cls, configurations: Configurations = "own") -> Parallel:
        """As `accelerate launch` or `spawn` set this process up; a single process where neither did."""
        state = PartialState(cpu=not torch.cuda.is_available())
        return cls(state.process_index, state.num_processes, configurations)

    def draw_step(self, step: int) -> int:
        """The step whose configuration this process takes at `step`."""
        return step if self.configurations == "same" else self.batch_step(step)

    def batch_step(self, step: int) -> int:
        """The step whose examples this process takes at `step`."""
        return step * self.world_size + self.rank

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its mean over the processes; those that no process has stay None."""
        if self.world_size == 1:
            return
        device = parameters[0].device
        used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=device)
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().float() for p in parameters])
        total = reduce(torch.cat([flat, used]), "mean")
        anywhere = total[len(flat) :].tolist()
        for parameter, mean, share in zip(
            parameters, total[: len(flat)].split([p.numel() for p in parameters]), anywhere, strict=True
        ):
            parameter.grad = mean.view_as(parameter).to(parameter.dtype) if share else None

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Of each flag whether it is true in any process."""
        if self.world_size == 1:
            return flags
        mine = torch.tensor([float(flag) for flag in flags], device=PartialState().device)
        return tuple(value > 0 for value in reduce(mine, "sum").tolist())

    def gather(self, values: Tensor) -> Tensor:
        """(W, ...) of every process's `values`, in the order of ranks."""
        return gather(values[None]) if self.world_size > 1 else values[None]


def spawn(
    function: Callable[..., Mapping[str, Any]],
    processes: int,
    *arguments: Any,
    on_message: Callable[[str, Any], None] | None = None,
) -> Mapping[str, Any]:
    """Run `function(*arguments)` in `processes` new processes that see each other, and return what rank 0 returns.

    Args:
        function: importable by name; returns tensors and JSON-able values by name, which come back from rank 0.
        processes: on a machine with GPUs at most as many as these; process p computes on GPU p.
        on_message: called here with what a process tells by `post`.

    An interrupt or a termination signal tells the processes to stop at their next boundary, and waits for that.

    Raises:
        CoaloraError: more processes than GPUs.
        torch.multiprocessing.ProcessRaisedException: a process failed; the others are ended.
    """
    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise CoaloraError(
            f"{processes} training processes need a GPU each, and there are {torch.cuda.device_count()}",
            remedy="Lower runtime.processes",
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="coalora-spawn-") as folder:
        messages = torch.multiprocessing.get_context("spawn").SimpleQueue()
        given = (processes, port, folder, function, arguments, messages)
        context = torch.multiprocessing.spawn(_process, given, nprocs=processes, join=False)
        try:
            while not context.join(timeout=0.2):
                _deliver(messages, on_message)
        except BaseException as error:
            if not isinstance(error, Exception):
                _end(context.processes)
            raise
        finally:
            _deliver(messages, on_message)
        tensors, rest = read_tensors(Path(folder) / _RESULT)
        return {**tensors, **rest}


def _deliver(messages: Any, on_message: Callable[[str, Any], None] | None) -> None:
    while not messages.empty():
        kind, content = messages.get()
        if on_message is not None:
            on_message(kind, content)


def _end(processes: Sequence[Any]) -> None:
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _PATIENCE
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _on_signal(*_: object) -> None:
    if _stop.is_set():  # told twice: at once
        raise Stopped("stopped at the second signal")
    _stop.set()


def _process(
    rank: int,
    processes: int,
    port: int,
    folder: str,
    function: Callable[..., Mapping[str, Any]],
    arguments: Any,
    messages: Any,
) -> None:
    global _messages
    _messages = messages
    # The parent passes a termination on; when it is killed itself, the kernel sends an interrupt.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _on_signal)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
    else:
        os.environ["ACCELERATE_USE_CPU"] = "true"
        keep_freed_memory()
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
    try:
        result = function(*arguments)
        if rank == 0:
            tensors = {k: v for k, v in result.items() if isinstance(v, Tensor)}
            write_tensors(Path(folder) / _RESULT, tensors, {k: v for k, v in result.items() if k not in tensors})
    except Stopped:
        raise SystemExit(128 + signal.SIGTERM) from None
    finally:
        PartialState(cpu=not torch.cuda.is_available()).destroy_process_group()
