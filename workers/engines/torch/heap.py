"""What the C library does with freed memory."""

from __future__ import annotations

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # parameters of glibc's mallopt
MMAP_THRESHOLD = 32 * 2**20  # the most that glibc takes; what is larger is a mapping of its own, as before
TRIM_THRESHOLD = 256 * 2**20


def keep_freed_memory() -> None:
    """Let this process keep up to `TRIM_THRESHOLD` that it has freed, where it runs on glibc; elsewhere nothing changes.

    A step on a CPU frees what it took, and the next one takes it again. glibc gives freed megabytes back to the system at once, so
    each step's results lie on new pages, which the kernel clears one by one: a fifth of a prefill step. What is kept is bounded by
    what the largest step needs.
    """
    with contextlib.suppress(AttributeError, OSError):  # no glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)
