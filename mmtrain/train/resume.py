"""Whether a run goes on from a checkpoint, and whether it may."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from mmtrain.config import Config
from mmtrain.errors import UserError
from mmtrain.foreign_text import shown
from mmtrain.train.checkpoint import CheckpointFolder, read_state

CHANGEABLE = frozenset(
    {
        "train.output_dir",
        "train.microbatch_tokens",
        "train.packing",
        "train.checkpoint_every",
        "train.keep_checkpoints",
        "train.eval_every",
        "data.eval",
    }
)
"""Keys that decide how a result is computed or what is written, and not what the result is."""


@dataclass(frozen=True, slots=True)
class Resume:
    checkpoint: Path
    step: int


def find_resume(checkpoints: CheckpointFolder, config: Config, fingerprint: str, console: Console) -> Resume | None:
    """The checkpoint to go on from, None where there is none.

    Raises UserError naming every key whose change would change the result.
    """
    checkpoint, broken = checkpoints.newest()
    for line in broken:
        console.print(f"warning: {line}", markup=False, highlight=False, soft_wrap=True)
    if checkpoint is None:
        return None
    state = read_state(checkpoint)
    before, now = _flat(state["config"]), _flat(config.model_dump(mode="json"))
    faults = [
        f"{key}: was {shown(before.get(key))} and is {shown(now.get(key))}, which changes the result"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not _changeable(key)
    ]
    if state["data"] != fingerprint:
        faults.append("data.train: the samples are not those the run began with")
    if faults:
        raise UserError(
            [
                *faults,
                f"{checkpoint}: the run cannot go on from here; undo the change, take another train.output_dir, "
                "or start over with --fresh",
            ]
        )
    console.print(f"continuing from {checkpoint}", highlight=False, soft_wrap=True)
    return Resume(checkpoint, int(state["step"]))


def start_over(output_dir: Path) -> None:
    """Delete what an earlier run left in `output_dir`, and nothing else."""
    for name in ("checkpoints", "adapter", "model"):
        shutil.rmtree(output_dir / name, ignore_errors=True)
    (output_dir / "metrics.jsonl").unlink(missing_ok=True)


def _changeable(key: str) -> bool:
    return any(key == free or key.startswith(free + ".") for free in CHANGEABLE)


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(data, dict | list):
        return {prefix: data}
    items = data.items() if isinstance(data, dict) else enumerate(data)
    return {k: v for key, value in items for k, v in _flat(value, f"{prefix}.{key}".lstrip(".")).items()}
