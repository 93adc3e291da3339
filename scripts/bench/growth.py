"""The cost of a token as the data grows, as samples get longer, and as they have more images.

    python scripts/bench growth [--most 1000000] [--model DIR] [--cores 2] [--plot docs/growth.svg]

Text samples of about 100 tokens, from a thousand to `--most` of them, are encoded and planned as before training, in a
new process, and opened again in another; next to the tokenizer's own encode_batch on the same texts and cores. Then
steps of one sample each, with ever more tokens or images, are trained with LoRA on a small Qwen2.5-VL with random
weights. Memory is the resident memory of the process and of all its children; shared pages count once for each.
"""

from __future__ import annotations

import argparse
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

import PIL.Image
import psutil

from bench.plot import Panel, draw, require_matplotlib
from bench.report import step_seconds
from bench.shapes import ROOT, TINY, make_model

TOKENS = 100
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
IMAGES = (0, 1, 2, 4, 8, 16)
SIDE = 224
"""Pixels: 64 placeholders per image."""
STEPS = 7
AHEAD = 8
"""Steps of the config beyond those taken: more than the loader reads ahead."""
LINES = {"mmtrain": "cost", "tokenizer's encode_batch": "base", "opened again": "again"}


class Words:
    """Invented words, frequent and rare, so that a tokenizer's cache helps no more than with real text."""

    def __init__(self, model: Path) -> None:
        from transformers import AutoTokenizer

        self._rng = random.Random(3)
        sounds = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
        self._known = ["".join(self._rng.choices(sounds, k=self._rng.randint(1, 4))) for _ in range(20_000)]
        self._weights = [1.0 / (rank + 10) for rank in range(len(self._known))]
        for rank, total in enumerate(self._weights[1:], 1):
            self._weights[rank] = total + self._weights[rank - 1]
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
        encode = tokenizer.backend_tokenizer.encode
        self._per_word = len(encode(self._take(2000))) / 2000
        self._around = len(encode(tokenizer.apply_chat_template(self._chat(0, ""), tokenize=False)))

    def chat(self, tokens: int, images: int = 0) -> dict[str, Any]:
        """A record of about that many tokens, not counting those of its images."""
        count = max(2, round((tokens - self._around) / self._per_word))
        return {"messages": self._chat(count // 2, "<image>" * images, count - count // 2)}

    def _chat(self, asked: int, before: str, answered: int = 0) -> list[dict[str, str]]:
        question, answer = before + self._take(asked), self._take(answered)
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def _take(self, count: int) -> str:
        return " ".join(self._rng.choices(self._known, cum_weights=self._weights, k=count))


def write_config(folder: Path, model: Path, data: Path, **train: Any) -> Path:
    config = {
        "model": {"path": str(model), "dtype": "float32"},
        "tune": {"language": {"mode": "lora"}},
        "data": {"train": [{"path": str(data)}], "max_length": 16384},
        "train": {"schedule": "constant", **train},
        "run": {"output_dir": str(folder / "out"), "threads": 1, "checkpoint_every": 10**9},
    }
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def watched(arguments: list[str], environment: dict[str, str]) -> float:
    """Run it. Returns the most GiB that it and its children had resident, sampled 20 times a second."""
    process = psutil.Popen([sys.executable, *arguments], env=environment)
    most = 0
    while process.poll() is None:
        try:
            family = [process, *process.children(recursive=True)]
            most = max(most, sum(one.memory_info().rss for one in family))
        except psutil.Error:  # one of them has just ended
            pass
        time.sleep(0.05)
    if process.returncode:
        sys.exit(f"{' '.join(arguments)}: exit code {process.returncode}")
    return most / 2**30


def measure_data(model: Path, counts: list[int], work: Path, cores: int) -> list[dict[str, Any]]:
    rows, words, result = [], Words(model), work / "result.json"
    parallel = {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(cores)}
    environment = {**os.environ, "HOME": str(work / "home"), "OMP_NUM_THREADS": str(cores)}
    print("   samples   tokens   samples/s      us/   encode_batch  half its    opened      GiB")
    print("              each               token        us/token      rate   again, s  (again)")
    for count in counts:
        folder = work / f"data-{count}"
        for used in (folder, work / "home"):
            shutil.rmtree(used, ignore_errors=True)
            used.mkdir(parents=True)
        data = folder / "chats.jsonl"
        with data.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(words.chat(TOKENS)) + "\n" for _ in range(count))
        config = write_config(folder, model, data, epochs=1, batch_size=32)
        found: list[dict[str, Any]] = []
        for arguments in (["open", str(config)], ["open", str(config)], ["tokenize", str(model), str(data)]):
            own = environment | (parallel if arguments[0] == "tokenize" else {})
            memory = watched(["-m", "bench.growth_runs", *arguments, str(result)], own)
            found.append({**json.loads(result.read_text()), "gib": memory})
        made, again, base = found
        cost, base_cost = (1e6 * one["seconds"] / one["tokens"] for one in (made, base))
        print(
            f"{count:10,} {made['tokens'] / count:8.1f} {count / made['seconds']:11,.0f} {cost:8.2f} "
            f"{base_cost:15.2f} {'yes' if cost <= 2 * base_cost else 'no':>9} {again['seconds']:10.2f} "
            f"{made['gib']:6.2f} ({again['gib']:.2f})",
            flush=True,
        )
        rows.append({"count": count, "cost": cost, "base": base_cost, "again": 1e6 * again["seconds"] / made["tokens"]})
        shutil.rmtree(folder)
    return rows


def measure_steps(work: Path, what: str, values: tuple[int, ...]) -> list[tuple[float, float]]:
    """For each value: it, and CPU milliseconds per token. `what` grows: the "tokens" of a sample or its "images"."""
    model, words, rows = make_model("qwen2.5-vl-tiny", work), Words(TINY), []
    print(f"{what:>10}  tokens/sample  CPU s/step  CPU ms/token")
    for value in values:
        folder = work / "steps"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_chats(folder, words, *((value, 0) if what == "tokens" else (LENGTHS[0], value)))
        found = train(folder, model)
        seconds = statistics.median(step_seconds(found, "cpu"))
        tokens = statistics.median(row["num_tokens"] for row in found["rows"])
        rows.append((float(value), 1e3 * seconds / tokens))
        print(f"{value:10,} {tokens:14,.0f} {seconds:11.3f} {rows[-1][1]:13.3f}", flush=True)
    return rows


def write_chats(folder: Path, words: Words, length: int, images: int) -> None:
    """Each with images of its own, and enough of them for a loader that reads ahead."""
    rng = random.Random(5)
    with (folder / "chats.jsonl").open("w", encoding="utf-8") as file:
        for number in range(STEPS + AHEAD):
            names = [f"{number}-{n}.png" for n in range(images)]
            for name in names:
                PIL.Image.frombytes("RGB", (SIDE, SIDE), rng.randbytes(3 * SIDE * SIDE)).save(folder / name)
            file.write(json.dumps(words.chat(length, images) | {"images": names}) + "\n")


def train(folder: Path, model: Path) -> dict[str, Any]:
    """The result of bench.own for a few steps on the folder's chats, one in each step."""
    steps = STEPS + AHEAD
    write_config(folder, model, folder / "chats.jsonl", batch_size=1, steps=steps)
    settings = {"device": "cpu", "built": True, "seed": 0, "steps": STEPS, "trace_memory": False, "overrides": []}
    (folder / "settings.json").write_text(json.dumps(settings | {"begun": time.time()}))
    environment = {**os.environ, "HOME": str(folder / "home"), "CUDA_VISIBLE_DEVICES": ""}  # caches are empty there
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    files = [str(folder / name) for name in ("config.json", "settings.json", "result.json")]
    command = [sys.executable, "-m", "bench.own", *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{folder}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "bench growth", None, __doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--most", type=int, default=1_000_000, help="samples, at most")
    parser.add_argument("--model", type=Path, default=TINY, help="the model whose tokenizer encodes them")
    parser.add_argument("--cores", type=int, default=2, help="that mmtrain and the tokenizer run on")
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="tokens of the longest sample trained on")
    parser.add_argument("--plot", type=Path, help="an SVG file to draw the results in")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "growth")
    return parser.parse_args(words)


def main(words: list[str]) -> None:
    """`python scripts/bench growth` with these arguments."""
    args = parse(words)
    if args.plot is not None:
        require_matplotlib()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    cores = sorted(os.sched_getaffinity(0))[: args.cores]
    os.sched_setaffinity(0, cores)
    counts = [count for count in (1_000, 10_000, 100_000, 1_000_000) if count <= args.most]
    data = measure_data(args.model.resolve(), counts, work, len(cores))
    lengths = measure_steps(work, "tokens", tuple(length for length in LENGTHS if length <= args.longest))
    images = measure_steps(work, "images", IMAGES)
    if args.plot is None:
        return
    lines = {name: [(row["count"], row[key]) for row in data] for name, key in LINES.items()}
    ms = "CPU ms per token"
    panels = [
        Panel("Encoding and planning", "samples in the data", "µs per token", lines),
        Panel("Training, text only", "tokens of a sample", ms, {"a step of one sample": lengths}),
        Panel("Training, with images", "images of a sample", ms, {"a step of one sample": images}, log_x=False),
    ]
    draw(panels, caption(args, len(cores)), args.plot)


def caption(args: argparse.Namespace, cores: int) -> list[str]:
    tokenizer = "the tiny model's" if args.model == TINY else f"{args.model.name}'s"
    return [
        f"Left: texts of about {TOKENS} tokens, {tokenizer} tokenizer, wall time on {cores} cores. Middle and right: "
        "CPU time of one thread; a Qwen2.5-VL of random weights (32k vocabulary, width 256, 4 layers),",
        f"float32, LoRA on the language model, one sample a step. Images of {SIDE} x {SIDE} pixels, 64 tokens each, "
        f"with about {LENGTHS[0]} tokens of text.",
    ]
