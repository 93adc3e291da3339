"""The figures of `mmtrain plan` for a person, in 80 columns."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from mmtrain.config import GIB
from mmtrain.plan.memory import CARDS
from mmtrain.safe_text import counted
from mmtrain.train.checkpointing import RESERVED_BYTES, RESERVED_SHARE
from mmtrain.train.summary import duration


def print_plan(figures: Mapping[str, Any], console: Console) -> None:
    """Print every figure; memory last."""
    print_lines(_lines(figures), console)
    print_memory(figures, console)


def print_memory(figures: Mapping[str, Any], console: Console) -> None:
    """What is known of the memory on a CPU and on GPUs."""
    if "cpu_memory" in figures:
        print_lines([("memory", _cpu_line(figures["cpu_memory"]))], console)
    if "gpu_memory" in figures:
        _print_gpu(figures["gpu_memory"], console)


def print_lines(lines: Iterable[tuple[str, str]], console: Console) -> None:
    """Each line with its title, which is empty where a line belongs to the title before."""
    for name, text in lines:
        console.print(f"{name:<10} {text}", soft_wrap=True)


def _lines(figures: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    data, steps, disk, time = (figures[name] for name in ("data", "steps", "disk", "time"))
    yield (
        "data",
        f"{counted(data['samples'], 'sample')}, {counted(data['images'], 'image')}, {data['left_out']:,} left out",
    )
    share = data["supervised"] / data["tokens"]
    yield "tokens", f"{data['tokens']:,}, {share:.1%} trained on; the longest sample has {data['longest']:,}"
    yield (
        "steps",
        f"{steps['steps']:,} of {counted(steps['batch_size'], 'sample')}, {steps['steps_per_epoch']:,} an epoch",
    )
    yield "", f"{steps['microbatches']:.3g} micro-batches a step on one process"
    padding = f"rows of one sample each would be {steps['padding_of_rows']:.1%} padding"
    yield "packing", f"on: {padding}" if steps["packing"] else f"off: {padding}"
    yield waiting_line(steps)
    total = disk["checkpoint"] * disk["num_checkpoints"]
    each = f"{disk['num_checkpoints']} x {size_text(disk['checkpoint'])}"
    yield "disk", f"{size_text(total)} checkpoints ({each}), {size_text(disk['encoded_samples'])} encoded samples"
    yield from image_feature_lines(disk)
    yield from time_lines(time)


def image_feature_lines(disk: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """How many of the features are on disk, where they are cached."""
    if disk["image_features"]:
        on_disk = size_text(disk["image_features_on_disk"])
        yield "", f"{on_disk} of {size_text(disk['image_features'])} image features (run.image_cache.disk_gib)"


def waiting_line(steps: Mapping[str, Any]) -> tuple[str, str]:
    """The time that processes wait for each other, for each number of them."""
    waiting = "  ".join(f"{count:,}: {share:.1%}" for count, share in steps["waiting"].items())
    return "waiting", f"{waiting}  (processes: their time spent waiting)"


def time_lines(time: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The least time that the run takes, and what it follows from."""
    yield "time", f"at least {duration(time['seconds'])} in one process on this machine's {time['device']}: a roofline,"
    yield "", f"{time['operations']:.2e} operations at {time['rate']:.2e} per second, as measured"


def _cpu_line(memory: Mapping[str, Any]) -> str:
    if "fault" in memory:
        return f"on the CPU, not predicted: {memory['fault']}"
    verdict = "fits" if memory["peak"] < memory["total"] else "does not fit"
    tokens = f"{memory['microbatch_tokens']:,} tokens in a micro-batch"
    machine = f"{'':<10} it {verdict}: this machine has {size_text(memory['total'])}"
    return f"on the CPU, {size_text(memory['peak'])} at {tokens};\n{machine}"


def _print_gpu(memory: Mapping[str, Any], console: Console) -> None:
    if "fault" in memory:
        print_lines([("memory", f"on a GPU, not predicted: {memory['fault']}")], console)
        return
    tokens, images = memory["microbatch_tokens"], memory["microbatch_images"]
    console.print(
        f"{'memory':<10} on a GPU, {size_text(memory['weights'])} of it weights; the longest micro-batch has\n"
        f"{'':<10} {counted(tokens, 'token')} and {counted(images, 'image')}\n"
        f"{'':<10} below: the largest run.microbatch_tokens that a card can take\n"
    )
    table = Table("checkpointing", "weights", "peak", *CARDS, box=None, pad_edge=False)
    for column in table.columns[2:]:
        column.justify = "right"
    for row in memory["rows"]:
        cells = ("no" if largest is None else f"{largest:,}" for largest in row["largest"].values())
        weights = f"shard, {row['shards']:,}" if row["shards"] > 1 else row["quantization"] or "replicate"
        table.add_row("on" if row["checkpointing"] else "off", weights, size_text(row["peak"]), *cells)
    console.print(table)
    console.print()
    for title, lines in (("fits", _fitting(memory["rows"])), ("estimate", _estimate(memory))):
        print_lines(itertools.zip_longest((title,), lines, fillvalue=""), console)


def _estimate(memory: Mapping[str, Any]) -> Iterator[str]:
    """Where the figures come from, and what they leave out."""
    yield "of what a GPU's kernels allocate, counted on shapes without a GPU;"
    yield f"{size_text(RESERVED_BYTES)} and {RESERVED_SHARE:.0%} of a card are left for workspaces and fragmentation"
    if any(row["shards"] > 1 for row in memory["rows"]):
        yield "peaks of sharded weights are computed from the others by a formula;"
        yield f"each micro-batch gathers {size_text(memory['weights'])} of weights twice: not in the time"


def _fitting(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """For each card the first row that fits, as the keys to set; what to try where none does."""
    for card in CARDS:
        row = next((row for row in rows if card in row["fits"]), None)
        if row is None:
            yield f"{card}: no; lower run.microbatch_tokens or data.max_length"
            continue
        shards = f", run.weights: shard on {row['shards']:,} GPUs" if row["shards"] > 1 else ""
        quantized = f", model.quantization: {row['quantization']}" if row["quantization"] else ""
        yield f"{card}: run.activation_checkpointing: {str(row['checkpointing']).lower()}{shards}{quantized}"


def size_text(num_bytes: float) -> str:
    """In GiB, or in MiB below one."""
    return f"{num_bytes / GIB:,.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:,.1f} MiB"
