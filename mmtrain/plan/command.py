"""`mmtrain plan`: the figures of a run, printed."""

import torch

from mmtrain.command_output import plain_console, print_json
from mmtrain.config import Config
from mmtrain.dataset.shard_order import first_file
from mmtrain.errors import UserError
from mmtrain.plan.chats import chat_figures
from mmtrain.plan.pairs import pair_figures, pair_lines
from mmtrain.plan.report import print_lines, print_memory, print_plan
from mmtrain.progress import Progress


def plan(config: Config, processes: str, as_json: bool) -> None:
    """Print what the run of `config` does and needs, for each number in `processes`. Raises UserError."""
    counts, progress = _counts(processes), Progress()
    config = first_file(config, progress.say)
    is_elsewhere = config.run.device == "cuda" and not torch.cuda.is_available()
    device = "cpu" if is_elsewhere else config.run.device
    is_chat = config.objective.kind == "chat"
    if is_chat:
        figures = chat_figures(config, device, is_elsewhere, counts, progress)
    else:
        figures = pair_figures(config, device, is_elsewhere, counts, progress)
    console = plain_console()
    if as_json:
        print_json(figures)
    elif is_chat:
        print_plan(figures, console)
    else:
        print_lines(pair_lines(figures), console)
        print_memory(figures, console)


def _counts(text: str) -> list[int]:
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"--processes: {text!r}: expected numbers above 0 with commas between them, such as 1,2,8")
    return sorted({int(word) for word in words})
