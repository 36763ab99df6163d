"""How this process uses memory on a CPU."""

import ctypes
import platform
from functools import cache

M_TRIM_THRESHOLD = -1  # from glibc's malloc.h
M_MMAP_MAX = -4


@cache  # once is enough
def keep_freed_memory():
    """Keep freed memory for the next step, where the C library is glibc.

    Memory that is given back has to be cleared by the system for each large tensor again, which
    costs a third of a step's time.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)  # no tensor gets a mapping of its own, which would end with it
        mallopt(M_TRIM_THRESHOLD, -1)  # the heap never shrinks
