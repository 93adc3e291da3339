"""One peer's run, in its own environment: transformers' Trainer with a plain collator, or TRL's SFTTrainer.

    python scripts/bench_peer.py plain|trl WORK_FOLDER SETTINGS.json RESULT.json

It gets the very ids and labels that mmtrain trains on and opens the pictures itself; it knows nothing of mmtrain.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, TrainerCallback


class Clock(TrainerCallback):  # type: ignore[misc]
    """Wall and CPU seconds at the end of each step, its loss, and when the first one ended."""

    def __init__(self, begun: float) -> None:
        self.rows: list[dict[str, float]] = []
        self._begun = begun

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.rows.append({"wall": time.time() - self._begun, "cpu": time.process_time()})

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs and self.rows:
            self.rows[-1]["loss"] = logs["loss"]


def collate(rows: list[dict[str, Any]], image_processor: Any, pad_id: int) -> dict[str, torch.Tensor]:
    """Padded on the right to the longest; the pictures of all in a row."""
    longest = max(len(row["ids"]) for row in rows)
    made = {
        "input_ids": torch.tensor([row["ids"] + [pad_id] * (longest - len(row["ids"])) for row in rows]),
        "labels": torch.tensor([row["labels"] + [-100] * (longest - len(row["labels"])) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row["ids"]) + [0] * (longest - len(row["ids"])) for row in rows]),
        "mm_token_type_ids": torch.tensor([row["types"] + [0] * (longest - len(row["ids"])) for row in rows]),
    }
    pictures = [Image.open(path).convert("RGB") for row in rows for path in row["pictures"]]
    if pictures:
        made |= dict(image_processor(images=pictures, return_tensors="pt"))
    return made


def main() -> None:
    kind, work, settings_path, result_path = sys.argv[1:]
    settings = json.loads(Path(settings_path).read_text())
    clock = Clock(settings["begun"])
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(settings["seed"])
    rows = [json.loads(line) for line in (Path(work) / "samples.jsonl").read_text().splitlines()]
    bf16 = settings["dtype"] == "bfloat16"
    model = AutoModelForImageTextToText.from_pretrained(
        settings["model"], dtype=torch.bfloat16 if bf16 else torch.float32
    )
    image_processor = AutoImageProcessor.from_pretrained(settings["model"], backend="pil")
    model.config.use_cache = False
    layers = "|".join(settings["targets"])
    model = get_peft_model(
        model,
        LoraConfig(r=settings["rank"], lora_alpha=settings["alpha"], target_modules=rf".*language_model.*\.({layers})"),
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    arguments = {
        "output_dir": str(Path(work) / kind),
        "per_device_train_batch_size": settings["batch_size"],
        "max_steps": settings["steps"],
        "learning_rate": settings["learning_rate"],
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": bf16,
        "use_cpu": settings["device"] == "cpu",
        "remove_unused_columns": False,
        "train_sampling_strategy": "sequential",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
    }

    def batch(found: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return collate([rows[row["number"]] for row in found], image_processor, settings["pad_id"])

    make_trainer = plain_trainer if kind == "plain" else trl_trainer
    trainer = make_trainer(model, arguments, batch, len(rows), settings)
    trainer.add_callback(clock)
    trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    gpu = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    Path(result_path).write_text(json.dumps({"rows": clock.rows, "peak_gib": gpu or peak}))


def plain_trainer(model: Any, arguments: dict[str, Any], batch: Any, num_rows: int, settings: dict[str, Any]) -> Any:
    from transformers import Trainer, TrainingArguments

    numbers = [{"number": number} for number in range(num_rows)]
    return Trainer(model, TrainingArguments(**arguments), train_dataset=numbers, data_collator=batch)


def trl_trainer(model: Any, arguments: dict[str, Any], batch: Any, num_rows: int, settings: dict[str, Any]) -> Any:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(**arguments, max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    numbers = Dataset.from_dict({"number": list(range(num_rows))})
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    return SFTTrainer(model, config, train_dataset=numbers, data_collator=batch, processing_class=tokenizer)


if __name__ == "__main__":
    main()
