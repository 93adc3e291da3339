"""mmtrain next to transformers' Trainer and TRL's SFTTrainer: the same model, samples, LoRA, batches and seed.

    python scripts/bench [--shape small-vocabulary|large-vocabulary|qwen2.5-vl-7b] [--dtype float32|bfloat16]
                         [--device cpu|cuda] [--trl-python VENV/bin/python] [--samples N --epochs 2] [--memory]

The runs alternate, each in its own process. No time counts unless the losses of the first steps agree. The other
programs get ids and labels made before, where their users' collators tokenize in every step; mmtrain makes its own,
with empty caches. So all train on the same labels, and their tokens per second can be compared. On the CPU, rates
and ratios are in CPU seconds of the process; on a GPU in wall seconds, with a synchronization at the end of each step.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.chats import make_data
from bench.report import NAMES, Runs, report_epochs, report_inputs, report_losses, report_memory, report_rates
from bench.shapes import ROOT, SHAPES, make_model

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NEEDED = {"plain": ["transformers", "peft"], "trl": ["transformers", "peft", "trl", "datasets"]}
AHEAD = 8
"""Steps in mmtrain's config beyond those taken: more than its loader reads ahead."""


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small-vocabulary")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the shape's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--samples", type=int, default=128, help="generated chats, rounded to whole batches")
    parser.add_argument("--epochs", type=int, help="instead of --steps; two are reported separately")
    parser.add_argument("--batch-size", type=int, help="default: the shape's")
    parser.add_argument("--checkpointing", action="store_true", help="of activations, for all programs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--memory", action="store_true", help="one more run each, for the largest allocation of a step")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of mmtrain's config")
    parser.add_argument("--plain-python", default=sys.executable, help="the python of the environment of Trainer")
    parser.add_argument("--trl-python", default=sys.executable, help="the python of an environment that has TRL")
    parser.add_argument("--without", choices=NEEDED, action="append", default=[], help="leave one out")
    parser.add_argument("--model", type=Path, help="a model directory instead of the generated one")
    parser.add_argument("--data", type=Path, help="chats instead of the generated ones")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "bench")
    return parser.parse_args(words)


def settings_of(args: argparse.Namespace, model: Path) -> dict[str, Any]:
    shape, on_gpu = SHAPES[args.shape], args.device == "cuda"
    return {
        "model": str(model),
        "built": shape.built and not args.model,
        "dtype": args.dtype or shape.dtype,
        "device": args.device,
        "threads": args.threads,
        "batch_size": args.batch_size or shape.batch_size,
        "checkpointing": args.checkpointing,
        "workers": 4 if on_gpu else 0,  # on the CPU their seconds would not be counted
        "overrides": args.set,
        "trace_memory": False,
        "rank": 16,
        "alpha": 32,
        "targets": TARGETS,
        "learning_rate": 1e-4,
        "seed": 0,
    }


def write_config(work: Path, data: Path, settings: dict[str, Any]) -> Path:
    config = {
        "model": {"path": settings["model"], "dtype": settings["dtype"]},
        "tune": {"language": {"mode": "lora", "rank": 16, "alpha": 32.0, "targets": TARGETS}},
        "data": {"train": [{"path": str(data)}], "max_length": 16384},
        "train": {
            "steps": settings["steps"] + AHEAD,
            "batch_size": settings["batch_size"],
            "learning_rate": settings["learning_rate"],
            "schedule": "constant",
            "seed": settings["seed"],
        },
        "run": {
            "output_dir": str(work / "mmtrain"),
            "threads": settings["threads"],
            "activation_checkpointing": settings["checkpointing"],
            "checkpoint_every": settings["steps"] + AHEAD,
        },
    }
    path = work / "config.json"  # JSON is YAML
    path.write_text(json.dumps(config, indent=1))
    return path


def write_inputs(work: Path, config: Path, settings: dict[str, Any]) -> tuple[list[list[int]], list[int], int]:
    """Write mmtrain's samples in the order of its steps, for the other programs.

    Returns the tokens of each sample of each step, the supervised tokens of each step and the steps of an epoch.
    """
    from mmtrain.config import load_config
    from mmtrain.encoding.load import load_processor
    from mmtrain.progress import QUIET
    from mmtrain.train.dataset import Dataset

    processor = load_processor(settings["model"])
    dataset = Dataset(load_config(config, settings["overrides"]), processor, QUIET)
    settings["pad_id"] = processor.tokenizer.traits.pad_id
    lengths, supervised = [], []
    with (work / "samples.jsonl").open("w") as file:
        for step in range(1, settings["steps"] + 1):
            numbers = dataset.plan.step(step)
            if len(numbers) < settings["batch_size"]:
                sys.exit("an epoch must be a whole number of batches: the other programs cut theirs differently")
            lengths.append(dataset.checked.num_tokens[numbers].tolist())
            supervised.append(int(dataset.checked.num_supervised[numbers].sum()))
            for number in numbers:
                encoded = dataset.train.encoded(number)
                labels = [int(i) if on else -100 for i, on in zip(encoded.ids, encoded.supervised, strict=True)]
                types = [int(i == processor.image_token_id) for i in encoded.ids]
                images = [str(span.image.source) for span in encoded.images]
                row = {"ids": encoded.ids.tolist(), "labels": labels, "types": types, "images": images}
                file.write(json.dumps(row) + "\n")
    return lengths, supervised, dataset.plan.steps_per_epoch


def run(name: str, python: str, work: Path, config: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """One run of one program; None, and a line that says why, where another program fails."""
    result, written = work / f"{name}.json", work / "settings.json"
    threads = str(settings["threads"])
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONWARNINGS": "ignore"}
    if settings["device"] == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    else:
        environment.setdefault("CUDA_VISIBLE_DEVICES", "0")
    arguments = ["-m", "bench.peer", name, str(work), str(written), str(result)]
    if name == "mmtrain":
        arguments = ["-m", "bench.own", str(config), str(written), str(result)]
        shutil.rmtree(work / "home", ignore_errors=True)
        environment["HOME"] = str(work / "home")
    written.write_text(json.dumps(settings | {"begun": time.time()}))
    done = subprocess.run([python, *arguments], env=environment, capture_output=True, text=True, check=False)
    if not done.returncode:
        found: dict[str, Any] = json.loads(result.read_text())
        return found
    if name == "mmtrain":
        sys.exit(f"mmtrain failed:\n{done.stderr[-3000:]}")
    last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    print(f"{NAMES[name]} is left out: {last[:300]}")
    return None


def available(args: argparse.Namespace) -> dict[str, str]:
    """The python of each program that can run here."""
    pythons = {"mmtrain": sys.executable}
    for name, python in (("plain", args.plain_python), ("trl", args.trl_python)):
        if name in args.without:
            continue
        look = f"import importlib.util as u; print(*[n for n in {NEEDED[name]} if u.find_spec(n) is None])"
        missing = subprocess.run([python, "-c", look], capture_output=True, text=True, check=True).stdout.strip()
        if missing:
            print(f"{NAMES[name]} is left out: {python} has no {missing.replace(' ', ', ')}")
        else:
            pythons[name] = python
    return pythons


def run_all(pythons: dict[str, str], rounds: int, work: Path, config: Path, settings: dict[str, Any]) -> Runs:
    found: Runs = {name: [] for name in pythons}
    for _ in range(rounds):
        for name in list(found):
            one = run(name, pythons[name], work, config, settings)
            if one is None:
                del found[name], pythons[name]
            else:
                found[name].append(one)
    return found


def main(words: list[str]) -> None:
    """`python scripts/bench` with these arguments."""
    args = parse(words)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no GPU here")
    work, shape = args.work.resolve(), SHAPES[args.shape]
    os.environ["HOME"] = str(work / "home")  # mmtrain's caches go where they are deleted before each run
    (work / "home").mkdir(parents=True, exist_ok=True)
    model = args.model or make_model(args.shape, work)
    settings = settings_of(args, model)
    batch_size = settings["batch_size"]
    num_samples = max(1, args.samples // batch_size) * batch_size
    settings["steps"] = args.steps if args.epochs is None else args.epochs * num_samples // batch_size
    if settings["steps"] <= 2:
        sys.exit("the first two steps are the warm-up: take more")
    config = write_config(work, args.data or make_data(work, shape, num_samples), settings)
    lengths, supervised, epoch = write_inputs(work, config, settings)
    report_inputs(lengths, supervised, epoch)
    pythons = available(args)
    found = run_all(pythons, args.rounds, work, config, settings)
    report_losses(found, settings["dtype"])
    report_rates(found, list(map(sum, lengths)), supervised, settings)
    if settings["steps"] >= 2 * epoch and epoch > 2:
        report_epochs(found, list(map(sum, lengths)), epoch, args.device)
    if args.memory:
        traced = run_all(pythons, 1, work, config, settings | {"steps": 3, "trace_memory": True})
        vocabulary = json.loads((Path(model) / "config.json").read_text())["text_config"]["vocab_size"]
        report_memory(traced, max(map(max, lengths[1:3])), vocabulary)
