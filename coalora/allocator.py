"""Setting of the C library for the memory of CPU tensors."""

from __future__ import annotations

import ctypes
import os

# Of glibc's malloc.h; mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_KEPT = 1 << 30


def keep_freed_memory() -> bool:
    """Let this process keep up to 1 GiB of freed memory for its next tensors, in one arena for all threads.

    By default glibc takes every tensor above 32 MiB from the kernel and gives it back after use (and smaller ones at
    the heap's end too), so that the same activations are page faults again in every batch; threads other than the
    first do so above 64 MiB whatever the threshold. In a virtual machine a fault costs more than the arithmetic on the
    page. Tensors above 1 GiB still go back at once. Call it before other threads allocate.

    Returns:
        Whether it was set: not where the C library has no such options (macOS, musl), and not where the environment
        chooses (a variable `MALLOC_...`, or `GLIBC_TUNABLES`).
    """
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    options = ((_M_MMAP_THRESHOLD, _KEPT), (_M_TRIM_THRESHOLD, _KEPT), (_M_ARENA_MAX, 1))
    return sum(mallopt(option, value) for option, value in options) == len(options)
