"""One measurement of growth.py, in its own process.

    python -m bench.growth_runs open CONFIG RESULT.json            encode and plan the data as training does
    python -m bench.growth_runs tokenize MODEL DATA RESULT.json    the tokenizer's own encode_batch on the same texts

Seconds are wall seconds, on the cores that the process was given; imports and the tokenizer's loading do not count.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path

BATCH = 1000
"""Texts given to encode_batch at once."""
MOST = 100_000
"""Texts it is measured on: its rate does not depend on their number."""
PASSES = 3
"""Of which the quickest counts."""


def open_data(config_path: Path, result: Path) -> None:
    from mmtrain.runtime.environment import set_environment
    from mmtrain.runtime.host_memory import keep_freed_memory

    set_environment()  # as the command does, before torch is imported
    keep_freed_memory()
    from mmtrain.config import load_config
    from mmtrain.encoding.load import processor_of
    from mmtrain.progress import QUIET
    from mmtrain.train.dataset import Dataset

    config = load_config(config_path)
    processor = processor_of(config.model)
    begun = time.perf_counter()
    dataset = Dataset(config, processor, QUIET)
    dataset.plan.step(1)
    seconds = time.perf_counter() - begun
    row = {"seconds": seconds, "samples": len(dataset.train), "tokens": int(dataset.checked.num_tokens.sum())}
    result.write_text(json.dumps(row))


def tokenize(model: Path, data: Path, result: Path) -> None:
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    template = AutoTokenizer.from_pretrained(model, local_files_only=True)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    with data.open(encoding="utf-8") as file:
        chats = [json.loads(line)["messages"] for line in itertools.islice(file, MOST)]
    texts = [template.apply_chat_template(chat, tokenize=False) for chat in chats]
    seconds = float("inf")
    for _ in range(PASSES):
        tokens, begun = 0, time.perf_counter()
        for start in range(0, len(texts), BATCH):
            found = tokenizer.encode_batch(texts[start : start + BATCH], add_special_tokens=False)
            tokens += sum(map(len, found))
        seconds = min(seconds, time.perf_counter() - begun)
    result.write_text(json.dumps({"seconds": seconds, "samples": len(texts), "tokens": tokens}))


if __name__ == "__main__":
    command, *paths = sys.argv[1:]
    if command == "open":
        open_data(*map(Path, paths))
    else:
        tokenize(*map(Path, paths))
