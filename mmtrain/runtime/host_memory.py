"""Host memory that is used again and again instead of being handed back: a training step on the CPU asks for the same
gigabytes every time, and the kernel clears every page it gives anew.
"""

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt, from its malloc.h."""


def keep_freed_memory() -> None:
    """Keep what is freed, large tensors too, which would otherwise have mappings of their own that go with them.

    Not where a model only passes through on its way to a GPU. Where the C library is another nothing changes.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
