"""`mmtrain inspect-labels`: a few samples in the terminal or on a page, or all of them audited."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from mmtrain.config import Config
from mmtrain.data.chat import SampleError
from mmtrain.data.encode import Encoder
from mmtrain.data.processor import load_processor
from mmtrain.data.samples import SampleSet
from mmtrain.errors import UserError
from mmtrain.inspect_labels.terminal import print_sample
from mmtrain.inspect_labels.view import SampleView, view_sample


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line says beside the config."""

    split: str = "train"
    indices: tuple[int, ...] = ()
    num: int = 3
    html: Path | None = None
    all: bool = False
    json: bool = False
    tokens: bool = False
    decode: bool = False
    losses: bool = False
    adapter: Path | None = None


def inspect_labels(config: Config, options: Options) -> int:
    """Show or audit; gives the exit code: 1 where a sample is at fault, 0 otherwise."""
    if options.all:
        return _audit(config, options)
    sources = config.data.train if options.split == "train" else config.data.eval
    if not sources:
        raise UserError(f"data.{options.split}: there are no sources in the config")
    encoder = Encoder(load_processor(config.model.path), config.labels.train_on, config.labels.end_of_turn)
    samples = SampleSet(sources, encoder)
    views, faults = _views(samples, _chosen(len(samples), options))
    losses = _losses(config, options, samples, views)
    if options.html is not None:
        from mmtrain.inspect_labels.page import write_page
        from mmtrain.inspect_labels.pixels import seen_pixels

        write_page(options.html, views, losses, pixels=seen_pixels(encoder.processor))
        print(f"wrote {options.html}: {len(views)} samples")
    elif options.json:
        for view in views:
            print(json.dumps(view.row(options.tokens), ensure_ascii=False))
    else:
        console = Console(highlight=False, emoji=False, markup=False)
        for view in views:
            print_sample(view, console, losses.get(view.index) if losses else None)
    for fault in faults:
        Console(stderr=True, soft_wrap=True).print(fault, markup=False, highlight=False)
    return 1 if faults else 0


def _chosen(num_samples: int, options: Options) -> list[int]:
    """The samples asked for, or `num` of them evenly spread."""
    wrong = [index for index in options.indices if not 0 <= index < num_samples]
    if wrong:
        raise UserError(f"--index {wrong[0]}: there are {num_samples:,} samples, 0 to {num_samples - 1}")
    num = min(options.num, num_samples)
    return list(options.indices) or [i * num_samples // num for i in range(num)]


def _views(samples: SampleSet, indices: Sequence[int]) -> tuple[list[SampleView], list[str]]:
    views, faults = [], []
    for index in indices:
        try:
            views.append(view_sample(samples, index))
        except SampleError as error:
            faults.append(f"{samples.place(index)}: refused: {error}")
    return views, faults


def _losses(
    config: Config, options: Options, samples: SampleSet, views: Sequence[SampleView]
) -> dict[int, dict[int, float]] | None:
    if not options.losses:
        return None
    from mmtrain.inspect_labels.losses import token_losses

    return token_losses(config, options.adapter, samples, [view.index for view in views])


def _audit(config: Config, options: Options) -> int:
    from mmtrain.inspect_labels.audit import audit

    def write(row: object) -> None:
        print(json.dumps(row, ensure_ascii=False))

    report = audit(
        config, options.split, options.decode, on_row=write if options.json else None, with_tokens=options.tokens
    )
    report.print(Console(stderr=options.json, highlight=False, emoji=False, markup=False))
    return 1 if report.num_faults else 0
