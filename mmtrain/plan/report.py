"""The figures of `mmtrain plan` for a person, in 80 columns."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from mmtrain.config import Config
from mmtrain.plan.memory import CARDS
from mmtrain.train.checkpointing import GIB, RESERVED_BYTES, RESERVED_SHARE
from mmtrain.train.summary import duration


def print_plan(figures: Mapping[str, Any], config: Config, console: Console) -> None:
    """Print every figure; memory last."""
    for name, text in _lines(figures, config):
        console.print(f"{name:<10} {text}", soft_wrap=True)
    if "cpu_memory" in figures:
        console.print(f"{'memory':<10} {_cpu_line(figures['cpu_memory'])}", soft_wrap=True)
    if "gpu_memory" in figures:
        _print_gpu(figures["gpu_memory"], config, console)


def _lines(figures: Mapping[str, Any], config: Config) -> Iterator[tuple[str, str]]:
    data, steps, disk, time = (figures[name] for name in ("data", "steps", "disk", "time"))
    yield "data", f"{data['samples']:,} samples, {data['images']:,} images, {data['left_out']:,} left out"
    share = data["supervised"] / data["tokens"]
    yield "tokens", f"{data['tokens']:,}, {share:.1%} trained on; the longest sample has {data['longest']:,}"
    yield "steps", f"{steps['steps']:,} of {steps['batch_size']:,} samples, {steps['steps_per_epoch']:,} an epoch"
    yield "", f"{steps['microbatches']:.3g} micro-batches a step on one process"
    padding = f"rows of one sample each would be {steps['padding_of_rows']:.1%} padding"
    yield "packing", f"on: {padding}" if steps["packing"] else f"off: {padding}"
    waiting = "  ".join(f"{count:,}: {share:.1%}" for count, share in steps["waiting"].items())
    yield "waiting", f"{waiting}  (processes: their time spent waiting)"
    total = disk["checkpoint"] * disk["num_checkpoints"]
    each = f"{disk['num_checkpoints']} x {_size(disk['checkpoint'])}"
    yield "disk", f"{_size(total)} checkpoints ({each}), {_size(disk['encoded_samples'])} encoded samples"
    if disk["image_features"]:
        on_disk = _size(disk["image_features_on_disk"])
        yield "", f"{on_disk} of {_size(disk['image_features'])} image features (run.image_cache.disk_gib)"
    yield (
        "time",
        f"at least {duration(time['seconds'])}: {time['operations']:.2e} operations at the {time['rate']:.2e}/s",
    )
    yield "", f"of a large matrix product on this machine's {time['device']}, on one process"


def _cpu_line(memory: Mapping[str, Any]) -> str:
    if "fault" in memory:
        return f"CPU: not predicted: {memory['fault']}"
    return (
        f"CPU: {_size(memory['peak'])} of {_size(memory['total'])} for tensors, with a micro-batch of "
        f"{memory['microbatch_tokens']:,} tokens"
    )


def _print_gpu(memory: Mapping[str, Any], config: Config, console: Console) -> None:
    if "fault" in memory:
        console.print(f"{'memory':<10} GPU: not predicted: {memory['fault']}", soft_wrap=True)
        return
    tokens, images = memory["microbatch_tokens"], memory["microbatch_images"]
    console.print(
        f"{'memory':<10} on a GPU, {_size(memory['weights'])} of it weights, for the longest micro-batch:\n"
        f"{'':<10} {tokens:,} tokens, {images:,} images (run.microbatch_tokens: {config.run.microbatch_tokens:,})"
    )
    console.print("the largest run.microbatch_tokens that fits, by card and by two other keys of run:")
    table = Table("activation_checkpointing", "weights", "peak", *CARDS, box=None, pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    for row in memory["rows"]:
        cells = ("no" if largest is None else f"{largest:,}" for largest in row["largest"].values())
        weights = "replicate" if row["shards"] == 1 else f"shard, {row['shards']:,}"
        table.add_row(str(row["checkpointing"]).lower(), weights, _size(row["peak"]), *cells)
    console.print(table)
    console.print(
        "estimate: what a GPU's kernels allocate was counted on shapes alone, without a GPU;\n"
        f"{_size(RESERVED_BYTES)} and {RESERVED_SHARE:.0%} of a card are kept free for workspaces and fragmentation"
    )


def _size(num_bytes: float) -> str:
    """In GiB, or in MiB below one."""
    return f"{num_bytes / GIB:,.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:,.1f} MiB"
