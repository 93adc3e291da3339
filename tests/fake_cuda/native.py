"""Compiles `device.cpp` and loads it. Imports no torch: the device has to be there before torch's Python module is."""

import ctypes
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("device.cpp")


def why_not() -> str | None:
    """Why there can be no fake device here, None where there can."""
    if shutil.which(_compiler()) is None:
        return f"there is no C++ compiler ({_compiler()}; CXX names another)"
    if not (_torch() / "lib" / "libtorch_cpu.so").is_file():
        return "torch's libraries are not where a build for Linux has them"
    if (_torch() / "lib" / "libtorch_cuda.so").is_file():
        return "this build of torch has a CUDA of its own"
    return None


def compile_device(folder: Path) -> Path:
    """The library, made in `folder`. Raises RuntimeError, with the compiler's words, where it does not compile."""
    library, torch = folder / "libfakecuda.so", _torch()
    includes = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    options = ["-std=c++20", "-O1", "-fPIC", "-shared", f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu"]
    command = [_compiler(), *includes, str(SOURCE), "-o", str(library), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"device.cpp does not compile against this torch:\n{done.stderr[-3000:]}")
    return library


def load_device(library: Path) -> None:
    """Put the device into this process."""
    for path in (_torch() / "lib" / "libc10.so", _torch() / "lib" / "libtorch_cpu.so", library):
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)


def _compiler() -> str:
    return os.environ.get("CXX", "c++")


def _torch() -> Path:
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent
