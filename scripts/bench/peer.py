"""One run of another program, in its own environment: transformers' Trainer with a plain collator, or TRL's SFTTrainer.

    python -m bench.peer plain|trl WORK_FOLDER SETTINGS.json RESULT.json

It gets the ids and labels that mmtrain trains on and opens the images itself; it imports nothing of mmtrain. Its
users' own collators would also tokenize and look for the labels in every step: that work is not counted here.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageTextToText, TrainerCallback

from bench.shapes import build_model
from bench.watch import Watch


class Clock(TrainerCallback):  # type: ignore[misc]
    """Times each step, and takes its loss from the log."""

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._watch.begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._watch.end()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" in logs and self._watch.rows:
            self._watch.rows[-1]["loss"] = logs["loss"]


def collate(rows: list[dict[str, Any]], image_processor: Any, pad_id: int) -> dict[str, torch.Tensor]:
    """Padded on the right to the longest; the images of all of them in one list."""
    longest = max(len(row["ids"]) for row in rows)
    made = {
        "input_ids": torch.tensor([row["ids"] + [pad_id] * (longest - len(row["ids"])) for row in rows]),
        "labels": torch.tensor([row["labels"] + [-100] * (longest - len(row["labels"])) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row["ids"]) + [0] * (longest - len(row["ids"])) for row in rows]),
        "mm_token_type_ids": torch.tensor([row["types"] + [0] * (longest - len(row["ids"])) for row in rows]),
    }
    images = [Image.open(path).convert("RGB") for row in rows for path in row["images"]]
    if images:
        made |= dict(image_processor(images=images, return_tensors="pt"))
    return made


def main() -> None:
    kind, work, settings_path, result_path = sys.argv[1:]
    settings = json.loads(Path(settings_path).read_text())
    watch = Watch(settings)
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(settings["seed"])
    rows = [json.loads(line) for line in (Path(work) / "samples.jsonl").read_text().splitlines()]
    bf16 = settings["dtype"] == "bfloat16"
    if settings["built"]:
        model = build_model(settings["model"], settings["dtype"], settings["device"], settings["seed"])
    else:
        dtype = getattr(torch, settings["dtype"])
        model = AutoModelForImageTextToText.from_pretrained(settings["model"], dtype=dtype)
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
        "gradient_checkpointing": settings["checkpointing"],
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "dataloader_pin_memory": settings["device"] == "cuda",
        "dataloader_num_workers": settings["workers"],
    }

    def batch(found: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return collate([rows[row["number"]] for row in found], image_processor, settings["pad_id"])

    make_trainer = plain_trainer if kind == "plain" else trl_trainer
    trainer = make_trainer(model, arguments, batch, len(rows), settings)
    trainer.add_callback(Clock(watch))
    trainer.train()
    Path(result_path).write_text(json.dumps({"rows": watch.rows}))


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
