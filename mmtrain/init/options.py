"""What the command line of `mmtrain init` says, and the values of a config that follow from it and the data's size."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtrain.config.yaml_file import yaml_text
from mmtrain.safe_text import counted, visible


@dataclass(frozen=True, slots=True)
class InitOptions:
    """The options of the command line."""

    model: str
    train: str
    """The training data."""
    evaluation: str | None
    """The evaluation data."""
    output: Path
    """The new file."""
    chat_template: str | None = None
    """The file with the chat template in place of the model's own."""
    prompt: str | None = None
    """What the user asks, the same for all samples."""

    @property
    def data(self) -> list[str]:
        """The training data, and the evaluation data if there is some."""
        return [self.train, *([] if self.evaluation is None else [self.evaluation])]

    def values(self, num_samples: int, batch_size: int, epochs: int) -> dict[str, Any]:
        """The values that configs of chats and of pairs have in common, as text or numbers, by name."""
        num_steps = epochs * math.ceil(num_samples / batch_size)
        return {
            "output": visible(str(self.output)),
            "model": yaml_text(self.model),
            "epochs": epochs,
            "steps": counted(num_steps, "step"),
            "batch_size": batch_size,
            "warmup_steps": min(20, num_steps // 10),
            "output_dir": yaml_text(f"runs/{self.output.stem}"),
            "every": max(1, num_steps // 5),
        }
