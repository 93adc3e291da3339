"""What a checkpoint records about its run, found by one process and known to all."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from mmtrain.config import Config
from mmtrain.config.keys import AFFECTS_BITS
from mmtrain.dataset.stream import Stream, StreamState
from mmtrain.progress import Progress
from mmtrain.runtime.processes import Runtime
from mmtrain.scoring.image_cache import caches_features
from mmtrain.train.checkpoint import CheckpointFolder
from mmtrain.train.dataset import num_steps
from mmtrain.train.fingerprint import fingerprints
from mmtrain.train.folder import BEST, finished_step, is_exported
from mmtrain.train.metrics import METRICS, evaluations_until
from mmtrain.train.objective import RunData
from mmtrain.train.resume import Resume, find_resume
from mmtrain.train.watched import History


class RunState:
    """What a checkpoint records about its run besides weights and moments, and whether a run may resume from one."""

    def __init__(self, config: Config, runtime: Runtime) -> None:
        self._config, self._runtime = config, runtime
        self._fingerprints: dict[str, str] = {}
        self._accepted: tuple[str, ...] = ()
        self._stream: Stream | None = None

    def resume(self, data: RunData, checkpoints: CheckpointFolder, accept: Sequence[str], progress: Progress) -> Resume:
        """Where the run resumes, found by the first process and reported to all. Raises what `find_resume` raises."""
        found = self._runtime.from_first("resume", lambda: asdict(self._find(data, checkpoints, accept, progress)))
        self._stream = data.stream
        if data.stream is not None and found["stream"] is not None:
            data.stream.start(StreamState.of(found["stream"]))
        return Resume(**found | {"checkpoint": found["checkpoint"] and Path(found["checkpoint"])})

    def is_finished(self, resume: Resume, num_steps: int) -> bool:
        """Whether the run has taken its last step, or ended early, and everything is exported."""
        output_dir, stopping = Path(self._config.run.output_dir), self._config.train.early_stopping
        has_ended = resume.step == num_steps
        if stopping is not None and not has_ended:
            has_ended = History(resume.evaluated).has_stopped_improving(stopping.metric, stopping.patience)
        has_best = self._config.run.keep_best is None or (output_dir / BEST).is_dir()
        return has_ended and is_exported(output_dir) and finished_step(output_dir) == resume.step and has_best

    def _find(self, data: RunData, checkpoints: CheckpointFolder, accept: Sequence[str], progress: Progress) -> Resume:
        """Hash what the result depends on and look for a checkpoint."""
        self._fingerprints = fingerprints(self._config, data, progress.tick)
        length, layout = partial(num_steps, plan=data.plan), self._layout
        found = find_resume(checkpoints, self._config, self._fingerprints, layout, accept, progress, length)
        self._accepted = found.accepted
        evaluated = evaluations_until(Path(self._config.run.output_dir) / METRICS, found.step)
        return replace(found, evaluated=evaluated, saved=checkpoints.steps())

    def at(self, step: int) -> dict[str, Any]:
        """What is written into the checkpoint after `step`."""
        return {
            "step": step,
            "config": self._config.model_dump(mode="json"),
            "fingerprints": self._fingerprints,
            "accepted": self._accepted,
            "layout": self._layout,
            "stream": None if self._stream is None else self._stream.state(step).row(),
        }

    @property
    def _layout(self) -> dict[str, Any]:
        """What decides the bits of the result, in addition to what decides the result itself: those keys of `run`, as
        this run executes them, and the machine."""
        run, runtime = self._config.run, self._runtime
        keys = {key: getattr(run, key) for key in AFFECTS_BITS}
        cached = caches_features(self._config, runtime.num_processes)  # the sizes of the cache do not change a bit
        exact = run.weights == "replicate" and run.microbatches != "auto"
        processes = {} if exact else {"processes": runtime.num_processes}
        return keys | {"threads": runtime.num_threads, "image_cache": cached} | processes | runtime.kernels
