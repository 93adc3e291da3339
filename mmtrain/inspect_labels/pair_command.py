"""`mmtrain inspect-labels` for pairs: shows what is compared in a step, or checks all pairs."""

from mmtrain.command_output import plain_console, print_json, write_page
from mmtrain.config import Config
from mmtrain.contrastive.load import load_embedder
from mmtrain.errors import UserError
from mmtrain.inspect_labels.options import LabelsOptions
from mmtrain.inspect_labels.pair_step import PairStep
from mmtrain.inspect_labels.pair_terminal import print_step
from mmtrain.progress import Progress
from mmtrain.runtime.processes import Runtime
from mmtrain.safe_text import visible
from mmtrain.train.contrastive.pair_dataset import PairDataset

_NUM_ROWS, _NUM_ROWS_OF_PAGE = 12, 64


def inspect_pairs(config: Config, options: LabelsOptions) -> int:
    """Show steps, or check all pairs. Returns the exit code: 1 if a pair has a fault, 0 otherwise."""
    for name in ("tokens", "losses", "adapter"):
        if getattr(options, name):
            raise UserError(f"--{name}: it is for objective.kind: chat")
    runtime = Runtime(config.model.dtype, device=config.run.device)
    progress = Progress(runtime.activity.tick)
    embedder = load_embedder(config, runtime, progress)
    if options.all:
        from mmtrain.inspect_labels.pair_audit import audit_pairs

        report = audit_pairs(config, options.split, embedder, progress)
        if options.json:
            print_json(report.row())
        else:
            report.print(plain_console())
        return 1 if report.faults else 0
    steps = _steps(config, options, PairDataset(config, embedder, progress))
    _show(steps, options)
    return 0


def _show(steps: list[tuple[PairStep, list[int]]], options: LabelsOptions) -> None:
    if options.html is not None:
        from mmtrain.inspect_labels.pair_page import page_of_steps

        write_page(options.html, page_of_steps(steps))
        print(f"wrote {visible(str(options.html))}: {len(steps)} step{'s' * (len(steps) != 1)}")
        return
    console = plain_console()
    for step, rows in steps:
        if options.json:
            for row in rows:
                print_json(step.row(row))
        else:
            print_step(step, rows, console)


def _steps(config: Config, options: LabelsOptions, dataset: PairDataset) -> list[tuple[PairStep, list[int]]]:
    """The steps of the first epoch that have the samples asked for, or the first one, and which queries to show."""
    num_rows = options.num or (_NUM_ROWS if options.html is None else _NUM_ROWS_OF_PAGE)
    every = _first_epoch(config, options.split, dataset)
    if not options.indices:
        return [(every[0], list(range(min(num_rows, len(every[0].relation.queries)))))]
    found = []
    for step in every:
        if own := [index for index in options.indices if index in step.indices]:
            asked = dict.fromkeys(row for index in own for row in step.rows_of(index))
            others = (row for row in range(len(step.relation.queries)) if row not in asked)
            found.append((step, [*asked, *others][: max(num_rows, len(asked))]))
    there = {index for step, _ in found for index in step.indices}
    if missing := [index for index in options.indices if index not in there]:
        raise UserError(f"--index {missing[0]}: no such pair in the first epoch of data.{options.split}")
    return found


def _first_epoch(config: Config, split: str, dataset: PairDataset) -> list[PairStep]:
    if split == "train":
        plan = dataset.plan
        steps = ((number, plan.step(number)) for number in range(1, plan.steps_per_epoch + 1))
        return [PairStep(number, dataset.train, tuple(indices)) for number, indices in steps]
    if not dataset.eval:
        raise UserError("data.eval: there are no sources in the config")
    size = config.train.batch_size
    return [
        PairStep(number, one.samples, tuple(one.samples.used[start : start + size].tolist()))
        for one in dataset.eval.values()
        for number, start in enumerate(range(0, len(one.samples.used), size), start=1)
    ]
