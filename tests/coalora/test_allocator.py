"""The allocator: activations of one batch are the memory of the next, in every thread."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys, threading
import torch
from coalora.allocator import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "kept":
    assert keep_freed_memory()

def faults():
    for rounds in (int(sys.argv[2]), 5):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(rounds):
            x = torch.ones(10 << 20)
            y = x + 1
            del x, y
    found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

found = []
faults()
thread = threading.Thread(target=faults)
thread.start()
thread.join()
print(*found)
"""
glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc's malloc")


def _python(code: str, *arguments: str, **variables: str) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=clean | variables, capture_output=True, text=True, check=True).stdout


@glibc
def test_large_tensors_reuse_the_memory_of_those_before_them_in_every_thread() -> None:
    # The heap has settled after some rounds: a small block may lie in a tensor's place, which then needs another.
    kept = [int(n) for n in _python(_FAULTS, "kept", "60").split()]
    given_back = [int(n) for n in _python(_FAULTS, "default", "5").split()]

    pages = 5 * 2 * (10 << 20) * 4 // os.sysconf("SC_PAGE_SIZE")
    assert min(given_back) >= 0.9 * pages, "the default has no such cost here: is the option still needed?"
    assert max(kept) < 0.01 * pages


@glibc
@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_ARENA_MAX", "2"), ("GLIBC_TUNABLES", "glibc.malloc.arena_max=2"), ("GLIBC_TUNABLES", "")],
)
def test_the_environment_s_own_choice_is_left_alone(name: str, value: str) -> None:
    code = "from coalora.allocator import keep_freed_memory; print(keep_freed_memory())"

    assert _python(code, **{name: value}).strip() == "False"


def test_a_c_library_without_the_option_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from coalora import allocator

    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: object())

    assert allocator.keep_freed_memory() is False
