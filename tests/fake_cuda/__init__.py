"""A CUDA device on a machine without one: its tensors say that they are on `cuda:0` and are computed on the CPU.

So the code that only a GPU reaches runs, with real numbers, and a test can compare them with the CPU's own path, count
kernels and find what makes the host wait. The device refuses what CUDA refuses, as far as `kernels.py` knows: tensors
of two devices, and what its attention kernels do not take. It has one stream, no speed of its own, and no NCCL.
"""
