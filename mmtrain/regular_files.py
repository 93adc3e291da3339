"""Opens only regular files, so that a pipe cannot hang the program and a device cannot fill the memory."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: Path) -> BinaryIO:
    """`path` opened for reading. Raises OSError, also if it is a folder, a pipe, a device or a socket."""
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # without O_NONBLOCK a pipe waits for a writer
    mode = os.fstat(number).st_mode
    if not stat.S_ISREG(mode):
        os.close(number)
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(
            code, os.strerror(code) if code == errno.EISDIR else "not a regular file: save it as one", str(path)
        )
    return os.fdopen(number, "rb")
