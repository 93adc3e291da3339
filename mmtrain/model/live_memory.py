"""Counts the bytes of the tensors that are alive, and the most that were alive at once."""

import weakref

from torch import Tensor


class LiveMemory:
    """The memory of the tensors that were given to `keep` and are alive. Tensors that share memory count once.

    `block`: bytes that an allocator rounds every allocation up to.
    """

    def __init__(self, block: int = 1) -> None:
        self._block = block
        self._sizes: dict[int, int] = {}
        self.num_bytes = 0
        """Bytes that are alive."""
        self.peak = 0
        """The most bytes that were alive at once since `reset`."""

    def reset(self) -> None:
        """Measure the peak from now on; what is alive stays counted."""
        self.peak = self.num_bytes

    def keep(self, tensor: Tensor) -> None:
        """Count `tensor` until its memory is freed."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            size = -(-storage.nbytes() // self._block) * self._block
            self._sizes[key] = size
            self.num_bytes += size
            self.peak = max(self.peak, self.num_bytes)
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.num_bytes -= self._sizes.pop(key, 0)
