"""Whether a run resumes from a checkpoint, and whether it may."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmtrain.config import Config
from mmtrain.config.keys import CHANGEABLE, EVALUATED
from mmtrain.config.schema import Train
from mmtrain.errors import UserError
from mmtrain.progress import Progress
from mmtrain.safe_text import shown
from mmtrain.train.checkpoint import CheckpointFolder, read_state
from mmtrain.train.optimizer import rate_factor

_LENGTH = ("train.steps", "train.epochs")
_CONTENT_OF = {
    "model.path": ("model.weights", "model.processor"),
    "model.adapter": ("model.adapter.weights",),
    "model.chat_template": ("model.template",),
    "data.train.0.path": ("data.train.0.records", "data.train.images"),
    "data.train.0.root": ("data.train.0.records", "data.train.images"),
}
"""The fingerprints of what a path names."""


@dataclass(frozen=True, slots=True)
class Resume:
    """Where a run resumes: after `step` of `checkpoint`, or from the beginning."""

    checkpoint: Path | None = None
    step: int = 0
    accepted: tuple[str, ...] = ()
    """What was changed since the run started and accepted, in order."""
    evaluated: tuple[dict[str, Any], ...] = ()
    """The rows of all evaluations up to `step`."""
    saved: tuple[int, ...] = ()
    """The steps that have a checkpoint."""
    stream: dict[str, Any] | None = None
    """Where the stream of `data.streaming` continues."""


def find_resume(
    checkpoints: CheckpointFolder,
    config: Config,
    fingerprints: dict[str, str],
    layout: dict[str, Any],
    accept: Sequence[str],
    progress: Progress,
    num_steps: Callable[[Train], int],
) -> Resume:
    """The checkpoint to resume from. `layout` is what decides the bits besides the config; its changes are reported.
    `num_steps`: the steps of a run with other settings. More steps than before extend the run.

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
    changed = [key for key in _changed(before, now) if not _may_change(key, config)]
    moved = [key for key in changed if _is_moved(key, before, now)]
    changed = [key for key in changed if key not in moved]
    longer = _longer(state, config, num_steps)
    unaccepted = [key for key in changed if not (longer and key in _LENGTH)]
    if refused := [key for key in unaccepted if not _among(key, accept)]:
        raise UserError(_refusal(checkpoint, refused, before, now))
    for key in moved:
        progress.say(f"moved: {key}: {_change(key, before, now)}, with the same content")
    for key in unaccepted:
        progress.say(f"accepted: {_accepted(state, key, before, now)}")
    if longer:
        progress.say(longer)
    progress.say(f"continuing from {checkpoint}")
    old: dict[str, Any] = state["layout"]
    others = [f"{key} {old[key]} → {layout[key]}" for key in layout if key in old and old[key] != layout[key]]
    if others:
        progress.say(f"the result is the same within rounding, its bits may differ: {', '.join(others)}")
    accepted = (*state["accepted"], *(_accepted(state, key, before, now) for key in changed))
    return Resume(checkpoint, int(state["step"]), accepted, stream=state["stream"])


def _refusal(checkpoint: Path, refused: Sequence[str], before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        *(f"{key}: {_change(key, before, now)}, which changes the result" for key in refused),
        f"{checkpoint}: the run cannot resume from here: undo the change, take another run.output_dir, start over with "
        f"--fresh, or resume all the same with {_accepting(refused)}",
    ]


def _accepted(state: dict[str, Any], key: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    return f"step {state['step']}: {key}: {_change(key, before, now)}"


def _longer(state: dict[str, Any], config: Config, num_steps: Callable[[Train], int]) -> str:
    """What extending the run of a checkpoint means, in one line; empty where the run does not become longer."""
    settings, before = config.train, state["config"]["train"]
    old = num_steps(Train(steps=before.get("steps"), epochs=before.get("epochs")))
    new, step = num_steps(settings), int(state["step"])
    if new <= old:
        return ""
    line = f"extended from {old:,} to {new:,} steps: "
    if settings.schedule == "constant":
        return f"{line}the rate is constant, so the result is that of {new:,} steps from the start"
    schedule = settings.warmup_steps, settings.schedule
    was = settings.learning_rate * rate_factor(step, old, *schedule)
    will_be = settings.learning_rate * rate_factor(step + 1, new, *schedule)
    return (
        f"{line}the rate was {was:.2e} in step {step:,} and is {will_be:.2e} in step {step + 1:,}, on the "
        f"{settings.schedule} of {new:,} steps; {new:,} steps from the start would give another result"
    )


def _changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]


def _may_change(key: str, config: Config) -> bool:
    """Whether a change of the key leaves the result as it is."""
    if config.train.early_stopping is not None and _among(key, EVALUATED):
        return False
    return _among(key, CHANGEABLE)


def _is_moved(key: str, before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a path changed and its content did not. Of several sources, the fingerprint of the images does not say
    which image is of which source."""
    content = _CONTENT_OF.get(key, ())
    if not content or (key.startswith("data.") and any(name.startswith("data.train.1.") for name in now)):
        return False
    is_same = all(before.get(name) == now.get(name) is not None for name in content)
    return is_same and before.get(key) is not None and now.get(key) is not None


def _accepting(keys: Sequence[str]) -> str:
    """The options that accept these keys; a section for many of its keys."""
    names = list(keys) if len(keys) <= 3 else dict.fromkeys(".".join(key.split(".")[:2]) for key in keys)
    return " ".join(f"--accept-change {name}" for name in names)


def _change(key: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    if key.endswith((".records", ".images", ".weights", ".files")) or key in ("model.processor", "model.template"):
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
