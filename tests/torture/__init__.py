"""Tries to break runs: see __main__.py. Here is the environment of all of them, set before torch is imported."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = Path(tempfile.mkdtemp(prefix="torture-"))
atexit.register(shutil.rmtree, WORK, ignore_errors=True)
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # read as torch is imported
    "HOME": str(WORK / "home"),  # hashes of files are kept there
    "PYTHONPATH": str(ROOT),
}
