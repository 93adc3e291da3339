"""Whether a run resumes from a checkpoint, and whether it may."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtrain.config import Config
from mmtrain.config.keys import CHANGEABLE, MOVED
from mmtrain.errors import UserError
from mmtrain.progress import Progress
from mmtrain.safe_text import shown
from mmtrain.train.checkpoint import CheckpointFolder, read_state


@dataclass(frozen=True, slots=True)
class Resume:
    """Where a run resumes: after `step` of `checkpoint`, or from the beginning."""

    checkpoint: Path | None = None
    step: int = 0
    accepted: tuple[str, ...] = ()
    """What was changed since the run started and accepted, in order."""
    evaluated: tuple[str, ...] = ()
    """Evaluation sets that were scored after `step`."""


def find_resume(
    checkpoints: CheckpointFolder,
    config: Config,
    fingerprints: dict[str, str],
    layout: dict[str, Any],
    accept: Sequence[str],
    progress: Progress,
) -> Resume:
    """The checkpoint to resume from. `layout` is what decides the bits besides the config; its changes are reported.

    Raises UserError naming every change that would change the result and is not among `accept`, and NoCheckpointError
    where no checkpoint is intact.
    """
    now = _flat(config.model_dump(mode="json")) | fingerprints
    _check_known(accept, now)
    checkpoint, broken = checkpoints.newest()
    for line in broken:
        progress.say(f"warning: {line}")
    if checkpoint is None:
        return Resume()
    state = read_state(checkpoint)
    before = _flat(state["config"]) | state["fingerprints"]
    may_change = (*CHANGEABLE, *MOVED)  # a checkpoint of an older version has the old key paths
    changed = [
        k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k) and not _among(k, may_change)
    ]
    refused = [key for key in changed if not _among(key, accept)]
    if refused:
        raise UserError(
            [
                *(f"{key}: {_change(key, before, now)}, which changes the result" for key in refused),
                f"{checkpoint}: the run cannot resume from here: undo the change, take another run.output_dir, start "
                f"over with --fresh, or resume all the same with {_accepting(refused)}",
            ]
        )
    accepted = [f"step {state['step']}: {key}: {_change(key, before, now)}" for key in changed]
    for line in accepted:
        progress.say(f"accepted: {line}")
    progress.say(f"continuing from {checkpoint}")
    old: dict[str, Any] = state["layout"]
    others = [f"{key} {old[key]} → {layout[key]}" for key in layout if key in old and old[key] != layout[key]]
    if others:
        progress.say(f"the result is the same within rounding, its bits may differ: {', '.join(others)}")
    return Resume(checkpoint, int(state["step"]), (*state["accepted"], *accepted))


def _accepting(keys: Sequence[str]) -> str:
    """The options that accept these keys; a section for many of its keys."""
    names = list(keys) if len(keys) <= 3 else dict.fromkeys(".".join(key.split(".")[:2]) for key in keys)
    return " ".join(f"--accept-change {name}" for name in names)


def _change(key: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    if key.endswith((".records", ".pictures", ".weights")) or key in ("model.processor", "model.template"):
        return "the content has changed since the run started"
    if key == "data.train.used":
        return "other samples are trained on (max_samples, dedup, or the share of data.eval)"
    was, is_now = ("not set" if found.get(key) is None else shown(found[key]) for found in (before, now))
    return f"was {was} and is {is_now}"


def _check_known(accept: Sequence[str], known: dict[str, Any]) -> None:
    for key in accept:
        if not any(_among(name, [key]) for name in known):
            near = difflib.get_close_matches(key, list(known), n=1)
            raise UserError(f"--accept-change {shown(key)}: no such key{f'; did you mean {near[0]}?' if near else ''}")


def _among(key: str, keys: Sequence[str]) -> bool:
    return any(key == one or key.startswith(one + ".") for one in keys)


def _flat(data: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(data, dict | list):
        return {prefix: data}
    items = data.items() if isinstance(data, dict) else enumerate(data)
    return {k: v for key, value in items for k, v in _flat(value, f"{prefix}.{key}".lstrip(".")).items()}
