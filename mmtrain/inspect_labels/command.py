"""`mmtrain inspect-labels`: shows a few samples in the terminal or on a page, or checks all of them."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mmtrain.config import Config
from mmtrain.dataset.shard_order import first_file
from mmtrain.errors import StorageError, UserError, grouped
from mmtrain.inspect_labels.chosen import ChosenSamples, look_at
from mmtrain.inspect_labels.options import Options
from mmtrain.inspect_labels.terminal import print_sample
from mmtrain.progress import Progress
from mmtrain.safe_text import shown, visible

__all__ = ["Options", "inspect_labels"]
_NUM_SAMPLES = 3


def inspect_labels(config: Config, options: Options) -> int:
    """Show samples, or check all of them. Returns the exit code: 1 if a sample has a fault, 0 otherwise."""
    if options.html is not None:
        _check_page(options.html)
    if config.objective.kind == "contrastive":
        from mmtrain.inspect_labels.pair_command import inspect_pairs

        return inspect_pairs(config, options)
    if options.split == "train":
        config = first_file(config, Progress().say)
    if options.all:
        return _audit(config, options)
    chosen = look_at(config, options.split, lambda num_samples, used: _chosen(num_samples, used, options))
    losses = _losses(config, options, chosen)
    if options.html is not None:
        from mmtrain.inspect_labels.page import write_page
        from mmtrain.inspect_labels.pixels import seen_pixels

        try:
            write_page(options.html, chosen.views, losses, pixels=seen_pixels(chosen.processor))
        except OSError as error:
            raise StorageError(f"--html {shown(options.html)}: cannot be written: {error.strerror}") from None
        print(f"wrote {visible(str(options.html))}: {len(chosen.views)} samples")
    elif options.json:
        for view in chosen.views:
            _print_json(view.row(options.tokens))
    else:
        console = Console(highlight=False, emoji=False, markup=False)
        for view in chosen.views:
            print_sample(view, console, losses.get(view.index) if losses else None)
    for fault in grouped(chosen.faults):
        Console(stderr=True, soft_wrap=True).print(fault, markup=False, highlight=False)
    return 1 if chosen.faults else 0


def _check_page(path: Path) -> None:
    """Raises UserError, before any work, if the file cannot be created."""
    if path.is_dir():
        raise UserError(f"--html {shown(path)}: that is a folder: name a file in it")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--html {shown(path)}: there is no folder {shown(path.absolute().parent)}: create it first")


def _print_json(row: object) -> None:
    """One JSON object on a line, escaped if standard output cannot encode it (a file name that is not UTF-8)."""
    line = json.dumps(row, ensure_ascii=False)
    try:
        line.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        line = json.dumps(row)
    print(line)


def _chosen(num_samples: int, used: Sequence[int], options: Options) -> list[int]:
    """The indices that were given, or `num` evenly spaced ones of those that are used."""
    wrong = [index for index in options.indices if not 0 <= index < num_samples]
    if wrong:
        raise UserError(f"--index {wrong[0]}: there are {num_samples:,} samples, 0 to {num_samples - 1}")
    num = min(options.num or _NUM_SAMPLES, len(used))
    return list(options.indices) or [used[i * len(used) // num] for i in range(num)]


def _losses(config: Config, options: Options, chosen: ChosenSamples) -> dict[int, dict[int, float]] | None:
    if not options.losses:
        return None
    from mmtrain.inspect_labels.losses import token_losses

    indices = [view.index for view in chosen.views]
    return token_losses(config, options.adapter, chosen.samples, chosen.processor, indices)


def _audit(config: Config, options: Options) -> int:
    from mmtrain.inspect_labels.audit import audit

    report = audit(config, options.split, on_row=_print_json if options.json else None, with_tokens=options.tokens)
    report.print(Console(stderr=options.json, highlight=False, emoji=False, markup=False))
    return 1 if report.num_faults else 0
