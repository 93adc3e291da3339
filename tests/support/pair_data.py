"""Pairs of images and texts with repeated items, and learners of them."""

import json
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from mmtrain.config.schema import Config
from mmtrain.contrastive.load import load_embedder
from mmtrain.progress import QUIET
from mmtrain.runtime.activity import Activity
from mmtrain.train.contrastive.learner import make_contrastive_learner
from mmtrain.train.contrastive.pair_dataset import PairDataset
from mmtrain.train.contrastive.step import ContrastiveLearner

FULL = {name: {"mode": "full"} for name in ("vision", "projector", "language")}
WORDS = ("red", "a blue circle", "green", "a large yellow square on the left", "two", "black and white", "teal")
NUM_PAIRS = 24


def write_pairs(folder: Path) -> Path:
    """Equal texts, equal images under other names, several texts of an image, and the same pair twice."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for n in range(NUM_PAIRS):
        content = n % 17  # later images are copies of the first
        PIL.Image.new("RGB", (40, 30 + content), (15 * content, 255 - 10 * content, 40)).save(folder / f"{n}.png")
        text = f"{WORDS[n % 7]} number {n % 11}"
        rows.append({"image": f"{n}.png", "text": [text, f"{WORDS[n % 5]} again"] if n % 6 == 5 else text})
    rows[-1] = rows[0]
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair_config(model: Path, pairs: Path, output: Path, **sections: Any) -> Config:
    """`sections`: their keys, over those that are given here."""
    given: dict[str, Any] = {
        "model": {"path": str(model), "dtype": "float32"},
        "objective": {"kind": "contrastive"},
        "tune": FULL,
        "data": {"train": [{"path": str(pairs)}]},
        "train": {"steps": 4, "batch_size": NUM_PAIRS, "learning_rate": 1e-3},
        "run": {"output_dir": str(output), "device": "cpu"},
    }
    replaced = {"tune"}
    for name, keys in sections.items():
        given[name] = keys if name in replaced else given.get(name, {}) | keys
    return Config.model_validate(given)


class Exchange:
    """What threads that stand for processes give each other."""

    def __init__(self, num_processes: int) -> None:
        self.num_processes = num_processes
        self._barrier = threading.Barrier(num_processes, timeout=120)
        self._given: dict[int, Tensor] = {}

    def all_of(self, index: int, values: Tensor) -> list[Tensor]:
        self._given[index] = values
        self._barrier.wait()
        found = [self._given[n].clone() for n in range(self.num_processes)]
        self._barrier.wait()
        return found


class ThreadRuntime:
    """The runtime of one such thread."""

    is_main = True
    device = torch.device("cpu")
    num_threads = 1

    def __init__(self, exchange: Exchange, index: int) -> None:
        self._exchange, self.index, self.num_processes = exchange, index, exchange.num_processes
        self.activity = Activity()

    def sum(self, values: Tensor) -> Tensor:
        return torch.stack(self._exchange.all_of(self.index, values)).sum(0)

    def gather(self, values: Tensor) -> Tensor:
        return torch.stack(self._exchange.all_of(self.index, values))

    def from_first(self, key: str, make: Callable[[], Any]) -> Any:
        return make()

    def agreed_stop_signal(self) -> None:
        """None asks to stop."""

    def autocast(self) -> Any:
        return nullcontext()


def learner_of(
    config: Config, exchange: Exchange, index: int, dtype: torch.dtype = torch.float32
) -> ContrastiveLearner:
    """A learner with LoRA's B non-zero."""
    runtime: Any = ThreadRuntime(exchange, index)
    embedder = load_embedder(config, runtime)
    embedder.model.to(dtype)
    learner = make_contrastive_learner(config, embedder, PairDataset(config, embedder, QUIET), runtime, QUIET)
    learner.model.to(dtype)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in learner.model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return learner


def in_threads(work: Callable[[int], None], count: int) -> None:
    """`work` of each number below `count`, all at once. Raises what one of them raises."""
    errors: list[BaseException] = []

    def caught(index: int) -> None:
        try:
            work(index)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=caught, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
