"""What the C library does with memory that torch has freed on a CPU."""

from __future__ import annotations

import ctypes
import platform

_M_MMAP_THRESHOLD = -3  # malloc.h


def return_freed_memory() -> None:
    """Have glibc give freed blocks of a megabyte and more back to the system at once.

    By itself it keeps blocks of up to 32 MB for later; between tensors of many sizes that is a gigabyte or two that
    nothing uses. Costs a few per cent of a step's time, so it is for those who are short of memory. No effect with
    another C library.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)
