"""What can be refused before the data is read."""

from mmtrain.config import Config
from mmtrain.errors import UserError
from mmtrain.model.quantization import check_installed
from mmtrain.runtime.processes import Runtime
from mmtrain.train.trackers import check_trackers


def check_preconditions(config: Config, runtime: Runtime) -> None:
    """Raises UserError where the processes cannot share the micro-batches, or a library that is needed is missing."""
    microbatches = config.run.microbatches
    if microbatches != "auto" and microbatches % runtime.num_processes:
        raise UserError(
            f"run.microbatches: {microbatches} cannot be shared by {runtime.num_processes} processes: "
            "expected a multiple of their number, or auto"
        )
    fewest = max(runtime.num_processes, 1 if microbatches == "auto" else microbatches)
    if config.data.streaming is not None and config.train.batch_size < fewest:
        raise UserError(
            f"train.batch_size: {config.train.batch_size} with data.streaming is fewer than {fewest}, the processes or "
            "run.microbatches of a step: raise it"
        )
    check_installed(config.model.quantization)
    check_trackers(config.run.trackers)
