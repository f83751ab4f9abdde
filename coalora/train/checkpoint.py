"""Checkpoints inside one call of `train`: a process that dies in mid-training goes on from its last one, bit for bit.

A folder holds `checkpoint.json` and one safetensors file that it names together with its sha256. The tensors are
written first and the JSON takes its place by one atomic rename: whenever the process dies, the JSON names a whole file.
What does not match its digest is ignored with a word about it.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from coalora.files import file_sha256, read_json, read_tensors, replace_file, to_disk, write_tensors

CHECKPOINT = "checkpoint.json"
# Writing takes at most this share of the time.
_SHARE = 0.05
_PENDING = "pending."
_DEFERRED = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)


@dataclass(frozen=True)
class Checkpoint:
    """State of training at a step's boundary.

    Attributes:
        step: steps done, of all rounds.
        tensors: as in `TrainingState`.
        records: of the steps whose losses have reached the host.
        pending: (step, values) of the last steps, whose losses have not.
    """

    step: int
    tensors: dict[str, Tensor]
    records: list[dict[str, float]]
    pending: list[tuple[int, Tensor]]


@dataclass
class Checkpoints:
    """The checkpoint of one training call, in a folder of its own.

    Args:
        folder: created when there is something to write.
        seconds: time between two checkpoints, at least; longer where writing one takes more than a twentieth of it.
        steps: steps between two checkpoints, in place of `seconds`.
        notify: told in words what was saved, resumed or ignored.
    """

    folder: Path
    seconds: float = 60.0
    steps: int | None = None
    notify: Callable[[str], None] = lambda words: None
    _saved_at: float = field(default_factory=time.monotonic, init=False)
    _cost: float = field(default=0.0, init=False)

    def due(self, step: int) -> bool:
        """Whether a checkpoint should be written after `step` steps."""
        if self.steps is not None:
            return step % self.steps == 0
        return time.monotonic() - self._saved_at >= max(self.seconds, self._cost / _SHARE)

    def save(self, span: tuple[int, int], checkpoint: Checkpoint) -> None:
        """Replace the checkpoint. `span`: first step of the call, and the one behind its last."""
        started = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{checkpoint.step:08d}-{uuid.uuid4().hex[:8]}.safetensors"
        tensors = dict(checkpoint.tensors)
        if checkpoint.pending:
            tensors[f"{_PENDING}values"] = torch.stack([values for _, values in checkpoint.pending])
        part = self.folder / f"{name}.part"
        try:
            sha256 = write_tensors(part, tensors)
            to_disk(part)
            os.replace(part, self.folder / name)
        finally:
            part.unlink(missing_ok=True)
        content = {
            "file": name,
            "sha256": sha256,
            "span": list(span),
            "step": checkpoint.step,
            "records": checkpoint.records,
            "pending": [step for step, _ in checkpoint.pending],
        }
        replace_file(self.folder / CHECKPOINT, json.dumps(content).encode(), durable=True)
        for other in self.folder.glob("*.safetensors*"):
            if other.name != name:
                other.unlink(missing_ok=True)
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - started

    def load(self, span: tuple[int, int]) -> Checkpoint | None:
        """The checkpoint of a call with this span; None where there is none, or none that is whole."""
        problem = ""
        try:
            return self._read(read_json(self.folder / CHECKPOINT), span)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except _Unusable as error:
            problem = str(error)
        except Exception as error:  # whatever a damaged file makes a reader say
            problem = f"it cannot be read ({type(error).__name__})"
        self.notify(f"WARNING: a checkpoint is ignored, training starts anew: {problem} ({self.folder})")
        return None

    def _read(self, content: Any, span: tuple[int, int]) -> Checkpoint:
        file = self.folder / Path(content["file"]).name
        if not file.is_file() or file_sha256(file) != content["sha256"]:
            raise _Unusable(f"{file.name} is missing or altered")
        if tuple(content["span"]) != span or not span[0] < content["step"] <= span[1]:
            raise _Unusable(f"it is of steps {content['span']}, not {list(span)}")
        tensors, _ = read_tensors(file)
        values = tensors.pop(f"{_PENDING}values", None)
        pending = list(zip(content["pending"], values, strict=True)) if values is not None else []
        self.notify(f"resumed from the checkpoint at step {content['step'] - span[0]} of {span[1] - span[0]}")
        return Checkpoint(content["step"], tensors, content["records"], pending)


class _Unusable(Exception):
    pass


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Signals whose handlers would raise (an interrupt, a cancellation, a time limit) wait until the block is done.

    For the moments in which a state is half of the old and half of the new step. Other threads than the main one run
    no handlers, and are left alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught: list[tuple[int, FrameType | None]] = []
    handlers: dict[int, Any] = {}
    try:
        for number in _DEFERRED:
            handler = signal.getsignal(number)
            if callable(handler):
                handlers[number] = handler
                signal.signal(number, lambda n, frame: caught.append((n, frame)))
        yield
    finally:
        for replaced, handler in handlers.items():
            signal.signal(replaced, handler)
        for received, frame in caught:
            handlers[received](received, frame)
