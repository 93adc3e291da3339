"""Host memory that is used again and again instead of being handed back: a training step on the CPU asks for the same
gigabytes every time, and the kernel clears every page it gives anew.
"""

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt, from its malloc.h."""
_LARGEST_ON_HEAP = 32 * 2**20
"""The most that glibc takes for the second of them."""


def reuse_host_memory() -> None:
    """Keep what is freed, and ask for large pages. To be called before torch is imported, which reads the variable
    once; where the C library is another nothing changes."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_MMAP_THRESHOLD, _LARGEST_ON_HEAP)
        library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
