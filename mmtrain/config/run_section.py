"""The section `run`: how a run is executed."""

import os
import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, Strict

from mmtrain.config.section import Count, Marker, Section, WatchedMetric
from mmtrain.safe_text import shown

GIB = 2**30
"""Bytes of a GiB, the unit of the keys that end in `_gib`."""


def _output_path(path: str) -> str:
    """`path` with the home folder for `~`. Raises ValueError for `$HOME` and the like: a folder of that name would be
    made."""
    if re.search(r"\$\{?[A-Za-z_]", path):
        raise ValueError(
            f"{shown(path)} has a variable, which is not replaced in a config: write the path out, or set "
            "run.output_dir on the command line"
        )
    return os.path.expanduser(path)


class ImageCache(Section):
    memory_gib: Annotated[float, Field(ge=0, le=10**6)] = 2.0
    """GiB of memory in each process for the cached features."""
    disk_gib: Annotated[float, Field(ge=0, le=10**6)] = 0.0
    """GiB on disk, in the user's cache, for the cached features: for later runs and for the other processes."""


class EvalAnswers(Section):
    samples: Count = 64
    """How many samples of `data.eval` are asked, spread over its sources and chosen by `train.seed`: always the
    same."""
    every: Count = 200
    """Steps between two times. The samples are also asked before the first step and after the last."""
    batch_size: Annotated[int, Field(gt=0, le=10**6)] = 16
    """Questions at a time. Lower it when memory runs out."""


class Run(Section):
    output_dir: Annotated[str, Field(min_length=1, pattern=r"^[^\x00]*$"), AfterValidator(_output_path)]
    """The directory for everything that the run writes."""
    device: Annotated[Literal["auto", "cpu", "cuda", "mps"], Marker.AFFECTS_BITS] = "auto"
    """What the run computes on. `auto`: the GPU if torch finds one, else the CPU. `cuda`: NVIDIA GPUs with any dtype
    from compute capability 8.0, with float32 below it. `mps` and, with `cuda`, ROCm are not tested, so they must be
    named."""
    microbatch_tokens: Annotated[Count, Marker.AFFECTS_BITS] = 2048
    """Tokens that go through the model at once. Lower it when memory runs out, raise it where a large GPU has memory
    to spare."""
    microbatches: Annotated[Literal["auto"] | Annotated[int, Field(gt=0, le=65_536)], Marker.AFFECTS_BITS] = "auto"
    """The number of micro-batches of a step. `auto`: the fewest that fit into `microbatch_tokens`, a multiple of the
    number of processes. A number, which the number of processes must divide: a step is divided the same way however
    many processes there are, so 1, 2, 4 and so on of them give the same bits."""
    weights: Annotated[Literal["replicate", "shard"], Marker.AFFECTS_BITS] = "replicate"
    """Every process stores all weights, or the weights are sharded over the processes (FSDP2): for models larger than
    one device, and for full fine-tuning."""
    packing: Annotated[Literal["auto"] | bool, Marker.AFFECTS_BITS] = "auto"
    """Put the samples of a micro-batch end to end in one row, without padding (true), or one row each, padded (false).
    `auto`: packed, except where a trial at the start shows that the samples of a row change each other's logits in
    this model. With true such a model is refused."""
    threads: Annotated[Annotated[int, Field(gt=0, le=1024)] | None, Marker.AFFECTS_BITS] = None
    """CPU threads of a process. Without it: one where `microbatches` is a number (bits depend on it), else torch's
    choice, the cores shared among the processes."""
    hang_timeout: Annotated[float, Field(ge=1, le=10**6)] = 600.0
    """Seconds without any progress after which the run fails and names the process that hangs."""
    activation_checkpointing: Annotated[Literal["auto"] | bool, Marker.AFFECTS_BITS] = "auto"
    """Compute the layers' activations again in the backward pass instead of storing them (true): less memory for the
    time of one more forward pass. `auto`: false on the CPU, and true on a GPU whose memory is smaller than what is
    predicted for the longest micro-batch."""
    compile: Annotated[bool, Marker.AFFECTS_BITS] = False
    """Compile the layers of the language model with torch.compile: fewer passes over memory, after a minute or more
    before the first step. Needs a C++ compiler on the CPU."""
    kernels: Annotated[Literal["auto", "off"], Marker.AFFECTS_BITS] = "auto"
    """Replace modules of the model by faster equivalents, each one where a trial at the start shows that it computes
    the same (`auto`), or compute everything with the model's own modules (`off`). On CUDA some are compiled at the
    start."""
    image_cache: Annotated[ImageCache, Marker.AFFECTS_BITS] = ImageCache()
    """Where vision and projector are frozen, each image goes through them once and their outputs are cached. 0 for
    both sizes: no cache."""
    graph_memory_gib: Annotated[float, Field(ge=0, le=10**6)] = 2.0
    """Contrastive training embeds a step's items, then computes the gradients. GiB of memory in each process for
    activations kept in between; what does not fit is computed twice."""
    checkpoint_every: Count = 500
    """Steps between checkpoints. The last step always has one."""
    keep_checkpoints: Annotated[int, Field(ge=2, le=10**6)] = 2
    """How many checkpoints are kept. Older ones are deleted."""
    eval_every: Count = 500
    """Steps between evaluations on `data.eval`. There is also one before the first step and one after the last."""
    eval_answers: EvalAnswers | None = None
    """Generate answers to some samples of `data.eval` during training, and score them as `mmtrain eval answers` does,
    next to the best blind answers. `{}` takes the defaults; null: no answers."""
    keep_best: WatchedMetric | None = None
    """Keep the best checkpoint by this figure besides the newest ones, and export it as `best/` at the end:
    `eval/perplexity`, `eval/nll`, `eval/token_accuracy`, or with `run.eval_answers` a metric such as
    `answers/exact_match`; of one source `eval/SOURCE/perplexity`. Of a contrastive run the mean over both directions,
    `retrieval/recall@1`, or one of them, `retrieval/image_to_text/recall@1`; also `mrr` and others."""

    trackers: Annotated[tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...], Strict(False)] = ()
    """Experiment trackers that get the figures of metrics.jsonl too, such as `[tensorboard]`. They write into
    `trackers/` in the output directory and never use the network. Each needs its library:
    `pip install "mmtrain[tensorboard]"`."""

    @property
    def num_threads(self) -> int | None:
        """CPU threads of a process, None where torch may choose."""
        return 1 if self.threads is None and self.microbatches != "auto" else self.threads

    def is_sharded(self, num_processes: int) -> bool:
        """Whether each of so many processes stores a share of the weights."""
        return self.weights == "shard" and num_processes > 1
