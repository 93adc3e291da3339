"""mmtrain: fine-tune vision-language models on your own image-text conversations."""

import sys

__version__ = "0.1.0"

if sys.platform == "win32":  # file locks, signals and forked processes are those of POSIX
    sys.exit("mmtrain: it does not run on Windows: use Linux, or Linux in WSL 2")
