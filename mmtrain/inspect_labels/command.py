"""`mmtrain inspect-labels`: shows a few samples in the terminal or on a page, or checks all of them."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from mmtrain.checks.findings import REFUSED
from mmtrain.config import Config
from mmtrain.dataset.encode_all import PartEncoder, Recipe
from mmtrain.dataset.samples import SampleSet
from mmtrain.dataset.store import find_store
from mmtrain.encoding.load import load_processor
from mmtrain.errors import StorageError, UserError, grouped
from mmtrain.inspect_labels.terminal import print_sample
from mmtrain.inspect_labels.view import SampleView, view_sample
from mmtrain.records.chat import SampleError
from mmtrain.safe_text import shown, visible


@dataclass(frozen=True, slots=True)
class Options:
    """The options of the command line."""

    split: str = "train"
    indices: tuple[int, ...] = ()
    num: int = 3
    html: Path | None = None
    all: bool = False
    json: bool = False
    tokens: bool = False
    losses: bool = False
    adapter: Path | None = None


def inspect_labels(config: Config, options: Options) -> int:
    """Show samples, or check all of them. Returns the exit code: 1 if a sample has a fault, 0 otherwise."""
    if options.html is not None:
        _check_page(options.html)
    if options.all:
        return _audit(config, options)
    sources = config.data.train if options.split == "train" else config.data.eval
    if not sources:
        raise UserError(f"data.{options.split}: there are no sources in the config")
    recipe, processor = Recipe.of(config, sources), load_processor(config.model.path)
    part_encoder = PartEncoder(recipe, processor)
    samples = part_encoder.samples
    if (store := find_store(recipe, samples)) is not None:
        samples.use(store)  # the encoding that training reads
    chosen = _chosen(len(samples), options)
    found = part_encoder.encode(chosen).faults
    faults = [f"{samples.place(index)}: {kind}: {reason}" for index, kind, reason in found]
    views = _views(samples, chosen, {index for index, kind, _ in found if kind == REFUSED})
    losses = _losses(config, options, samples, views)
    if options.html is not None:
        from mmtrain.inspect_labels.page import write_page
        from mmtrain.inspect_labels.pixels import seen_pixels

        try:
            write_page(options.html, views, losses, pixels=seen_pixels(processor))
        except OSError as error:
            raise StorageError(f"--html {shown(options.html)}: cannot be written: {error.strerror}") from None
        print(f"wrote {visible(str(options.html))}: {len(views)} samples")
    elif options.json:
        for view in views:
            _print_json(view.row(options.tokens))
    else:
        console = Console(highlight=False, emoji=False, markup=False)
        for view in views:
            print_sample(view, console, losses.get(view.index) if losses else None)
    for fault in grouped(faults):
        Console(stderr=True, soft_wrap=True).print(fault, markup=False, highlight=False)
    return 1 if faults else 0


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


def _chosen(num_samples: int, options: Options) -> list[int]:
    """The indices that were given, or `num` evenly spaced ones."""
    wrong = [index for index in options.indices if not 0 <= index < num_samples]
    if wrong:
        raise UserError(f"--index {wrong[0]}: there are {num_samples:,} samples, 0 to {num_samples - 1}")
    num = min(options.num, num_samples)
    return list(options.indices) or [i * num_samples // num for i in range(num)]


def _views(samples: SampleSet, indices: Sequence[int], refused: set[int]) -> list[SampleView]:
    """Views of the samples that can be encoded. Raises UserError if one has changed since it was stored."""
    try:
        return [view_sample(samples, index) for index in indices if index not in refused]
    except SampleError as error:
        raise UserError(f"data: {error}; run the command again once the data has stopped changing") from None


def _losses(
    config: Config, options: Options, samples: SampleSet, views: Sequence[SampleView]
) -> dict[int, dict[int, float]] | None:
    if not options.losses:
        return None
    from mmtrain.inspect_labels.losses import token_losses

    return token_losses(config, options.adapter, samples, [view.index for view in views])


def _audit(config: Config, options: Options) -> int:
    from mmtrain.inspect_labels.audit import audit

    report = audit(config, options.split, on_row=_print_json if options.json else None, with_tokens=options.tokens)
    report.print(Console(stderr=options.json, highlight=False, emoji=False, markup=False))
    return 1 if report.num_faults else 0
