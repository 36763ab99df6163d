"""How this process holds on to memory."""

import ctypes
import platform


def keep_freed_memory():
    """Keep freed memory for the next step, where the C library is glibc. Given back, it has to be
    cleared by the system for each large tensor anew, which costs a third of a step's time."""
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no tensor gets a mapping of its own, which ends with it
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
