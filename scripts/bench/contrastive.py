"""Contrastive steps of a dual encoder: mmtrain next to sentence-transformers and open_clip, same model, pairs and loss.

    python scripts/bench contrastive [--sizes 256,1024] [--peers-python VENV/bin/python] [--loss-stage]

Each program runs in a process of its own with one thread; times are CPU seconds of a step, images opened in it. The
losses of the first step must agree. sentence-transformers runs its CachedMultipleNegativesRankingLoss in both
directions. open_clip's models are its own, so its ClipLoss and the loop of its `--accum-freq` train the same model of
transformers here. A library that is not installed is restated in plain torch, which the report says.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from bench.shapes import ROOT

TINY = ROOT / "data_samples" / "tiny-clip"
SIDE, LENGTH = 64, 48
WORDS = (
    "a",
    "red",
    "blue",
    "small",
    "large",
    "circle",
    "square",
    "next to",
    "under",
    "over",
    "the",
    "left",
    "two",
    "black",
)
OWN = {"mmtrain": 16.0, "mmtrain, all computed twice": 0.0}
"""`run.graph_memory_gib` of mmtrain's runs."""
PEERS = {"st": "sentence-transformers, cached", "clip": "open_clip, one pass", "accumulated": "open_clip, --accum-freq"}
LARGEST_PASS = 256
"""Pairs that go through at once where nothing is cached: more take too much memory."""
TOLERANCE = 1e-4
AHEAD = 8
"""Steps in mmtrain's config beyond those taken: more than its loader reads ahead."""


def make_model(folder: Path) -> Path:
    """A CLIP of 19 million parameters with random weights, around the tokenizer of the tiny one."""
    if (folder / "model.safetensors").exists():
        return folder
    shutil.copytree(TINY, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("model.safetensors"))
    (folder / "model.safetensors").unlink(missing_ok=True)
    config = CLIPConfig.from_pretrained(TINY)
    for part, width, layers in ((config.text_config, 256, 6), (config.vision_config, 384, 8)):
        part.hidden_size, part.intermediate_size, part.num_hidden_layers = width, 4 * width, layers
        part.num_attention_heads = width // 64
    config.text_config.max_position_embeddings = LENGTH
    config.vision_config.image_size, config.vision_config.patch_size = SIDE, 16
    config.projection_dim = 256
    config.dtype = None
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    for name, change in (
        ("preprocessor_config.json", {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}),
        ("tokenizer_config.json", {"model_max_length": LENGTH, "processor_class": "CLIPProcessor"}),
    ):
        settings = json.loads((folder / name).read_text()) | change
        (folder / name).write_text(json.dumps(settings))
    return folder


def make_pairs(folder: Path, num: int) -> Path:
    """Images of noise with captions of 4 to 15 words, all of them different."""
    folder.mkdir(parents=True, exist_ok=True)
    path, draw = folder / f"pairs-{num}.jsonl", random.Random(0)
    rows = []
    for n in range(num):
        values = np.random.default_rng(n).integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(values).resize((SIDE, SIDE)).save(folder / f"{n}.png")
        words = draw.choices(WORDS, k=min(14, 3 + int(draw.expovariate(1 / 5))))
        rows.append({"image": f"{n}.png", "text": f"{n} {' '.join(words)}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_config(work: Path, settings: dict[str, Any], graph_memory: float) -> Path:
    config = {
        "model": {"path": settings["model"], "dtype": "float32"},
        "objective": {"kind": "contrastive", "scale": settings["scale"]},
        "tune": {name: {"mode": "full"} for name in ("vision", "projector", "language")},
        "data": {"train": [{"path": settings["pairs"]}]},
        "train": {
            "steps": settings["steps"] + AHEAD,
            "batch_size": settings["batch_size"],
            "learning_rate": settings["learning_rate"],
            "schedule": "constant",
            "max_grad_norm": None,
        },
        "run": {
            "output_dir": str(work / "mmtrain"),
            "device": "cpu",
            "threads": settings["threads"],
            "graph_memory_gib": graph_memory,
            "checkpoint_every": settings["steps"] + AHEAD,
        },
    }
    path = work / "config.json"  # JSON is YAML
    path.write_text(json.dumps(config, indent=1))
    return path


def run(python: str, work: Path, arguments: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """What one program measured. Exits where it fails."""
    result, written = work / "result.json", work / "settings.json"
    threads = str(settings["threads"])
    home = work / "home"
    shutil.rmtree(home, ignore_errors=True)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONWARNINGS": "ignore"}
    environment |= {"HF_HUB_OFFLINE": "1", "HOME": str(home)}
    written.write_text(json.dumps(settings | {"begun": time.time()}))
    words = [str(written) if word == "SETTINGS" else str(result) if word == "RESULT" else word for word in arguments]
    done = subprocess.run([python, "-m", *words], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{arguments[1]} failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(result.read_text())
    return found


def compare(args: argparse.Namespace, work: Path, num: int) -> None:
    """Steps of `num` pairs by every program, reported."""
    settings = {
        "model": str(make_model(work / "model")),
        "pairs": str(make_pairs(work / "pairs", num)),
        "batch_size": num,
        "steps": args.steps,
        "threads": 1,
        "scale": 20.0,
        "learning_rate": 1e-4,
        "mini_batch": args.mini_batch,
        "device": "cpu",
        "built": False,
        "overrides": [],
        "trace_memory": False,
    }
    found: dict[str, dict[str, Any]] = {}
    for name, graph_memory in OWN.items():
        config = write_config(work, settings, graph_memory)
        found[name] = run(sys.executable, work, ["bench.own", str(config), "SETTINGS", "RESULT"], settings)
    for kind, name in PEERS.items():
        if kind != "clip" or num <= LARGEST_PASS:
            words = ["bench.contrastive_peer", kind, "SETTINGS", "RESULT"]
            one = run(args.peers_python, work, words, settings)
            found[name + (" (restated)" if one["is_restated"] else "")] = one
    report(num, found)


def report(num: int, found: dict[str, dict[str, Any]]) -> None:
    """Seconds and memory, against the best of the other programs."""
    seconds = {name: seconds_of(one["rows"]) for name, one in found.items()}
    best = min(value for name, value in seconds.items() if name not in OWN)
    losses = {name: one["rows"][0]["loss"] for name, one in found.items()}
    expected = losses["mmtrain"]
    print(f"{num} pairs a step: CPU seconds, peak GiB, times as fast as the fastest of the others, first loss")
    for name, one in found.items():
        agrees = "" if abs(losses[name] - expected) <= TOLERANCE * expected else "  DOES NOT AGREE"
        peak = one["rows"][-1]["peak_gib"]
        print(f"  {name:42} {seconds[name]:7.2f} {peak:6.2f} {best / seconds[name]:6.2f}  {losses[name]:.5f}{agrees}")


def seconds_of(rows: list[dict[str, float]]) -> float:
    """The median of the steps after the first."""
    return statistics.median(after["cpu"] - before["cpu"] for before, after in itertools.pairwise(rows))


def loss_stage(args: argparse.Namespace, work: Path) -> None:
    """The loss and its gradients alone, of embeddings that are there."""
    settings = {"threads": 1, "num": args.loss_items, "width": 512, "scale": 20.0}
    for kind, python in (("loss-own", sys.executable), ("loss-clip", args.peers_python)):
        one = run(python, work, ["bench.contrastive_peer", kind, "SETTINGS", "RESULT"], settings)
        name = "mmtrain" if kind == "loss-own" else "ClipLoss" + (" (restated)" if one["is_restated"] else "")
        print(f"  {name:20} {one['cpu']:6.1f} CPU s {one['extra_gib']:6.2f} GiB extra, loss {one['loss']:.5f}")


def main(words: list[str]) -> None:
    """`python scripts/bench contrastive` with these arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="256", help="pairs of a step, with commas between them")
    parser.add_argument("--steps", type=int, default=3, help="the first one is the warm-up")
    parser.add_argument("--mini-batch", type=int, default=32, help="pairs that the other programs compute at once")
    parser.add_argument(
        "--peers-python", default=sys.executable, help="the python of an environment with the libraries"
    )
    parser.add_argument("--loss-stage", action="store_true", help="the loss alone too")
    parser.add_argument("--loss-items", type=int, default=16_384)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "bench-contrastive")
    args = parser.parse_args(words)
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    for size in args.sizes.split(","):
        compare(args, work, int(size))
    if args.loss_stage:
        print(f"The loss of {args.loss_items:,} pairs of 512 values and its gradients:")
        loss_stage(args, work)
