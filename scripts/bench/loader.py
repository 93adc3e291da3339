"""Images per second and core: the family's own processor next to mmtrain's loader, in turns."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import psutil
import torch

from bench.shapes import TINY
from mmtrain.dataset.image_process import ImageProcess, load_images
from mmtrain.encoding.images import FoundImage
from mmtrain.encoding.load import load_processor
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.encoding.processor_settings import ProcessorSettings

_QWEN = {"patch_size": 14, "min_pixels": 56 * 56, "max_pixels": 28 * 28 * 16_384}
"""Qwen2.5-VL's own."""


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="scripts/bench loader", description=__doc__)
    parser.add_argument("--sides", type=int, nargs="+", default=[448, 1000, 4000], help="of square JPEG files")
    parser.add_argument("--images", type=int, default=32, help="in each round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    processor = load_processor(str(TINY), ProcessorSettings(image_processor=_QWEN), tried=True)
    with tempfile.TemporaryDirectory() as name:
        for side in options.sides:
            files = [_jpeg(Path(name), side, number) for number in range(options.images)]
            _compare(processor, files, options.rounds)


def _jpeg(folder: Path, side: int, number: int) -> FoundImage:
    noise = np.random.default_rng(number).integers(0, 256, (side // 8, side // 8, 3), np.uint8)
    path = folder / f"{side}-{number}.jpg"
    PIL.Image.fromarray(noise).resize((side, side), PIL.Image.Resampling.BICUBIC).save(path, quality=90)
    return FoundImage(path.name, path, (side, side))


def _compare(processor: ChatProcessor, files: list[FoundImage], rounds: int) -> None:
    assert processor.images is not None
    assert processor.origin is not None
    own = processor.images.processor
    process = ImageProcess(processor.origin, raw=True, pinned=False)
    while not process.is_ready():
        time.sleep(0.1)
    ways: dict[str, Callable[[FoundImage], Any]] = {
        "family's own": lambda file: own(
            text=[own.image_token], images=[[PIL.Image.open(file.source).convert("RGB")]], return_tensors="pt"
        ),
        "floats, in a thread": lambda file: load_images(processor, [[file]], None, raw=False),
        "8 bits, in a thread": lambda file: load_images(processor, [[file]], None, raw=True),
        "8 bits, in a process": lambda file: process.load([[file]], None),
    }
    both = [psutil.Process(), psutil.Process(process._server.process.pid)]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begun = _cpu_seconds(both)
            for file in files:
                way(file)
            seconds[name].append((_cpu_seconds(both) - begun) / len(files))
    process.end()
    first = statistics.median(seconds["family's own"])
    for name, each in seconds.items():
        median = statistics.median(each)
        print(f"{files[0].size[0]:5} px  {name:21} {1 / median:6.1f} images/s per core  {first / median:.2f} times")


def _cpu_seconds(processes: list[psutil.Process]) -> float:
    return sum(used.user + used.system for used in (one.cpu_times() for one in processes))
