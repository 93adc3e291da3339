"""Restores a run from a checkpoint, and saves it: when that is due, at a signal, and before a fault of the data."""

from mmtrain.errors import StorageError, UserError
from mmtrain.progress import Progress
from mmtrain.runtime.shard import share, whole
from mmtrain.train.checkpoint import CheckpointFolder, checkpoint_bytes, restore, snapshot
from mmtrain.train.objective import Trained
from mmtrain.train.resume import Resume
from mmtrain.train.run_state import RunState


class Checkpointer:
    """The state of `learner` in a folder of checkpoints. All processes call it; the first one writes."""

    def __init__(self, checkpoints: CheckpointFolder, state: RunState, learner: Trained, progress: Progress) -> None:
        """Raises StorageError where there is no room for the checkpoints to come."""
        self._checkpoints, self._state, self._learner, self._progress = checkpoints, state, learner, progress
        self._saved = 0
        self.complete = 0
        """The last step that is complete: the weights are those after it until the next one is."""
        self.best: int | None = None
        """The step of the best checkpoint, which is kept besides the newest."""
        if learner.runtime.is_main:
            checkpoints.check_room(checkpoint_bytes(learner.model))

    def restore(self, resume: Resume) -> None:
        """Raises UserError where the checkpoint is of other weights than the model's."""
        if resume.checkpoint is not None:
            restore(resume.checkpoint, self._learner.model, self._learner.optimizer, share)
        self._saved = self.complete = resume.step

    def restore_after(self, step: int) -> None:
        """Put the weights of an earlier step into the model. Raises NoCheckpointError where they are not intact."""
        restore(self._checkpoints.at(step), self._learner.model, self._learner.optimizer, share)

    def save(self, step: int) -> int | None:
        """Write a checkpoint after `step`; gives the signal that asked to stop meanwhile."""
        runtime = self._learner.runtime
        runtime.activity.set("saving" if runtime.is_main else "awaiting the save")
        self._write(step)
        return runtime.agreed_stop_signal()

    def save_complete(self, error: UserError) -> None:
        """Save the last complete step before `error`, a fault of the data in any process, ends the run, and say so.

        Only the first process can save: the others are about to exit, so sharded weights cannot be gathered any more.
        """
        step, runtime = self.complete, self._learner.runtime
        if error.exit_code != UserError.exit_code or step == self._saved or not runtime.is_main:
            return
        if self._learner.sharded:
            error.faults[-1] += f"; step {step} cannot be saved, because the weights are sharded"
            return
        runtime.activity.set("saving")
        try:
            self._write(step)
        except StorageError as failed:
            error.faults += failed.faults
        else:
            error.faults[-1] += f"; step {step} is saved: fix the data and run the same command again"

    def _write(self, step: int) -> None:
        """Where weights are sharded, all processes gather them for the first one."""
        runtime, learner = self._learner.runtime, self._learner
        if runtime.is_main or learner.sharded:
            weights = snapshot(learner.model, learner.optimizer, whole, self._progress.tick)
            if runtime.is_main:
                self._checkpoints.save(step, weights, self._state.at(step), self.best)
        self._saved = step
