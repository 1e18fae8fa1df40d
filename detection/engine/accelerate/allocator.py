"""Host memory of a training on the CPU: what a step frees serves the next one, instead of going back to the system."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

# malloc.h of the GNU C library.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = -1
_MMAP_MAX_DEFAULT, _TRIM_THRESHOLD_DEFAULT = 65536, 128 * 1024


def keep_freed_memory() -> bool:
    """From now on this process keeps the memory it frees; whether the C library could be told so.

    The GNU C library returns each large tensor to the system when it is freed, and the next one of its size costs a
    page fault every 4 KiB: a tenth of a training step's time. Tensors are then taken from the heap and the heap is
    never cut, so the process holds what its largest step needed, which it needs again. Other C libraries (macOS,
    musl) are left as they are. Memory of GPUs is not concerned.
    """
    return _set({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: _NEVER})


def return_freed_memory() -> bool:
    """Back to the C library's usual thresholds; whether it could be told so."""
    done = _set({_M_MMAP_MAX: _MMAP_MAX_DEFAULT, _M_TRIM_THRESHOLD: _TRIM_THRESHOLD_DEFAULT})
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)
    return done


def _set(options: dict[int, int]) -> bool:
    library = _glibc()
    return library is not None and all(library.mallopt(option, value) == 1 for option, value in options.items())


def _glibc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None
