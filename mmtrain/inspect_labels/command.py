"""`mmtrain inspect-labels`: shows a few samples in the terminal or on a page, or checks all of them."""

from collections.abc import Sequence

from mmtrain.command_output import check_page, plain_console, print_json, write_page
from mmtrain.config import Config
from mmtrain.dataset.shard_order import first_file
from mmtrain.errors import UserError, grouped
from mmtrain.inspect_labels.chosen import ChosenSamples, look_at
from mmtrain.inspect_labels.options import LabelsOptions
from mmtrain.inspect_labels.terminal import print_sample
from mmtrain.progress import Progress
from mmtrain.safe_text import counted, visible

_NUM_SAMPLES = 3


def inspect_labels(config: Config, options: LabelsOptions) -> int:
    """Show samples, or check all of them. Returns the exit code: 1 if a sample has a fault, 0 otherwise."""
    check_page(options.html)
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
        from mmtrain.inspect_labels.page import page_of_samples
        from mmtrain.inspect_labels.pixels import seen_pixels

        write_page(options.html, page_of_samples(chosen.views, losses, pixels=seen_pixels(chosen.processor)))
        print(f"wrote {visible(str(options.html))}: {counted(len(chosen.views), 'sample')}")
    elif options.json:
        for view in chosen.views:
            own = {} if losses is None else {"losses": losses.get(view.index, {})}
            print_json(view.row(options.tokens) | own)
    else:
        console = plain_console()
        for view in chosen.views:
            print_sample(view, console, losses.get(view.index) if losses else None)
    for fault in grouped(chosen.faults):
        plain_console(stderr=True).print(fault, soft_wrap=True)
    return 1 if chosen.faults else 0


def _chosen(num_samples: int, used: Sequence[int], options: LabelsOptions) -> list[int]:
    """The indices that were given, or `num` evenly spaced ones of those that are used."""
    wrong = [index for index in options.indices if not 0 <= index < num_samples]
    if wrong:
        raise UserError(f"--index {wrong[0]}: there are {num_samples:,} samples, 0 to {num_samples - 1}")
    num = min(options.num or _NUM_SAMPLES, len(used))
    return list(options.indices) or [used[i * len(used) // num] for i in range(num)]


def _losses(config: Config, options: LabelsOptions, chosen: ChosenSamples) -> dict[int, dict[int, float]] | None:
    if not options.losses:
        return None
    from mmtrain.inspect_labels.losses import token_losses

    indices = [view.index for view in chosen.views]
    return token_losses(config, options.adapter, chosen.samples, chosen.processor, indices)


def _audit(config: Config, options: LabelsOptions) -> int:
    from mmtrain.inspect_labels.audit import audit

    report = audit(config, options.split, on_row=print_json if options.json else None, with_tokens=options.tokens)
    report.print(plain_console(stderr=options.json))
    return 1 if report.num_faults else 0
