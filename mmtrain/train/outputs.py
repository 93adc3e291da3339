"""What a run leaves when its steps are taken: the export of its last weights and of the best ones, and a summary."""

from pathlib import Path

from mmtrain.config import Config
from mmtrain.errors import NoCheckpointError
from mmtrain.progress import Progress
from mmtrain.train.checkpointer import Checkpointer
from mmtrain.train.folder import BEST, write_finished
from mmtrain.train.objective import TrainingObjective
from mmtrain.train.report import best_line, end_report
from mmtrain.train.watched import Best


def write_outputs(
    objective: TrainingObjective, config: Config, checkpointer: Checkpointer, best: Best | None, progress: Progress
) -> None:
    """Export, and say what was done. Where weights are sharded all processes must call this."""
    output_dir = Path(config.run.output_dir)
    progress.say(objective.export())
    if best is not None:
        _export_best(objective, config, checkpointer, best, progress)
    if objective.learner.runtime.is_main:
        write_finished(output_dir, checkpointer.complete)
        for line in end_report(output_dir):
            progress.say(line)


def _export_best(
    objective: TrainingObjective, config: Config, checkpointer: Checkpointer, best: Best, progress: Progress
) -> None:
    try:
        if best.step != checkpointer.complete:
            checkpointer.restore_after(best.step)
    except NoCheckpointError as error:
        progress.say(f"warning: {BEST}/ is not written, because the best checkpoint is damaged: {error}")
        return
    progress.say(objective.export(BEST, best.step))
    progress.say(best_line(config, best))
