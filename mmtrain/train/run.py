"""`mmtrain train`: check the data, find the checkpoint, load the model, take the steps, export what was trained."""

from collections.abc import Sequence
from pathlib import Path

from mmtrain.config import Config, dump_config
from mmtrain.progress import Progress
from mmtrain.runtime.processes import Runtime
from mmtrain.train.chat import ChatObjective
from mmtrain.train.checkpoint import CheckpointFolder
from mmtrain.train.checkpointer import Checkpointer
from mmtrain.train.contrastive.objective import ContrastiveObjective
from mmtrain.train.folder import write_inputs
from mmtrain.train.loop import OnStep, TrainingLoop
from mmtrain.train.lost_gradients import missing_gradients_are_errors
from mmtrain.train.objective import TrainingObjective
from mmtrain.train.outputs import write_outputs
from mmtrain.train.preconditions import check_preconditions
from mmtrain.train.report import finished_line
from mmtrain.train.run_state import RunState


def train(config: Config, accept: Sequence[str] = (), on_step: OnStep = lambda row: None) -> bool:
    """Start or resume the run that `config` describes, `accept`ing changes of these keys since its checkpoint.

    `on_step` is called after each step with its row of metrics.jsonl and the step's floating-point `operations`. Gives
    whether the run took its last steps now and this is its main process, which may add to the run's directory.

    Raises UserError for what the user can fix, and Stopped where a signal asked to stop.
    """
    runtime = Runtime(config.model.dtype, config.run.hang_timeout, config.run.num_threads, config.run.device)
    progress = Progress(runtime.activity.tick, quiet=not runtime.is_main)
    with runtime.supervised(Path(config.run.output_dir) / "stacks"):
        has_finished = _train(config, accept, on_step, runtime, progress)
    runtime.close()
    return has_finished and runtime.is_main


def _train(config: Config, accept: Sequence[str], on_step: OnStep, runtime: Runtime, progress: Progress) -> bool:
    output_dir, activity = Path(config.run.output_dir), runtime.activity
    check_preconditions(config, runtime)
    activity.set("checking the data")
    objective = _objective(config, runtime, progress)
    data = objective.data
    activity.set("comparing with the checkpoint")
    checkpoints = CheckpointFolder(
        output_dir / "checkpoints", config.run.keep_checkpoints, config.run.keep_best is not None
    )
    state = RunState(config, runtime)
    resume = state.resume(data, checkpoints, accept, progress)
    if state.is_finished(resume, data.num_steps):
        progress.say(finished_line(output_dir, resume.step, data.num_steps))
        return False
    if runtime.is_main:
        write_inputs(output_dir, dump_config(config), data.dropped_rows(), resume.step)
    activity.set("loading the model")
    learner = objective.learner
    if runtime.is_main:
        objective.write_facts()
    checkpointer = Checkpointer(checkpoints, state, learner, progress)
    checkpointer.restore(resume)
    for line in objective.report():
        progress.say(line)
    loop = TrainingLoop(config, objective, checkpointer, progress)
    with missing_gradients_are_errors():
        best = loop.take_steps(resume, on_step)
    activity.set("exporting" if runtime.is_main else "waiting")
    if runtime.is_main or learner.sharded:
        write_outputs(objective, config, checkpointer, best, progress)
    activity.set("waiting")
    return True


def _objective(config: Config, runtime: Runtime, progress: Progress) -> TrainingObjective:
    made = ChatObjective if config.objective.kind == "chat" else ContrastiveObjective
    return made(config, runtime, progress)
