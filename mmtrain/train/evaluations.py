"""What is evaluated during a run, and when."""

from collections.abc import Sequence
from typing import Any, Protocol

from mmtrain.config import Config
from mmtrain.progress import Progress
from mmtrain.runtime.processes import Runtime
from mmtrain.safe_text import visible
from mmtrain.train.metrics import MetricsFile
from mmtrain.train.watched import History


class RunEvaluation(Protocol):
    """What is evaluated on one set, again and again."""

    kind: str
    """The key of its rows of metrics.jsonl, whose value is the name of the set."""
    name: str
    every: int
    """Steps between two of them."""

    def row(self, step: int) -> dict[str, Any] | None:
        """The figures after `step`; None where a signal asked to stop meanwhile."""

    def line(self, row: dict[str, Any]) -> str:
        """What is printed of them."""


class Evaluations:
    """The evaluations of a run, each before the first step, every so many steps and after the last."""

    def __init__(
        self,
        each: Sequence[RunEvaluation],
        history: History,
        config: Config,
        num_steps: int,
        runtime: Runtime,
        metrics: MetricsFile,
        progress: Progress,
    ) -> None:
        """`history`: those up to the step that the run resumes from."""
        self._each, self._num_steps, self._runtime = each, num_steps, runtime
        self._metrics, self._progress = metrics, progress
        self._history, self._stopping = history, config.train.early_stopping

    @property
    def has_ended(self) -> bool:
        """Whether the run ends early, because it no longer improves."""
        stopping = self._stopping
        return stopping is not None and self._history.has_stopped_improving(stopping.metric, stopping.patience)

    def run(self, step: int) -> int | None:
        """All that are due after `step` and not in the history; gives the signal that asked to stop meanwhile.

        Where the run ends early, all others follow. An evaluation that was interrupted is repeated when the run is
        resumed.
        """
        stop_signal = self._run(step, [one for one in self._each if step % one.every == 0 or step == self._num_steps])
        if stop_signal is None and self.has_ended:
            return self._run(step, self._each)
        return stop_signal

    def _run(self, step: int, due: Sequence[RunEvaluation]) -> int | None:
        runtime = self._runtime
        done = self._history.after(step)
        for one in due:
            if any(row.get(one.kind) == one.name for row in done):
                continue
            runtime.activity.set("evaluating", step)
            figures = one.row(step)
            if figures is None:
                return runtime.agreed_stop_signal()
            row = {"step": step, one.kind: one.name, **figures}
            self._metrics.write(row)
            self._history.add(row)
            self._progress.say(f"step {step}  {one.kind} {visible(one.name)}: {one.line(figures)}")
        return runtime.agreed_stop_signal() if due else None
