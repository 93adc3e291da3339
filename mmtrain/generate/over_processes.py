"""Replies that several processes generate, each for some of the prompts, made known to all of them."""

import math
from collections.abc import Mapping

import torch

from mmtrain.generate.replies import Generator, Reply
from mmtrain.runtime.processes import Runtime

_NUM_FIGURES = 2


def known_to_all(
    own: Mapping[int, Reply], num_prompts: int, max_new_tokens: int, generator: Generator, runtime: Runtime
) -> tuple[dict[int, Reply], int | None]:
    """The replies to all prompts, by number, from those that each process has, and the signal that asked all processes
    to stop; then some replies may be missing.

    All processes must call this. Each sends a table with a row for every prompt (number of tokens, log-probability,
    tokens), which is zero where it has no reply; their sum is exact, because float64 represents every token id.
    """
    table = torch.zeros(num_prompts, _NUM_FIGURES + max_new_tokens, dtype=torch.float64)
    for number, reply in own.items():
        figures = [len(reply.ids), math.nan if reply.log_probability is None else reply.log_probability]
        table[number, : _NUM_FIGURES + len(reply.ids)] = torch.tensor([*figures, *reply.ids], dtype=torch.float64)
    total, stop_signal = runtime.agree(table.flatten())
    found: dict[int, Reply] = {}
    for number, (length, log_probability, *ids) in enumerate(total.view_as(table).tolist()):
        if length:
            own_ids = [int(id_) for id_ in ids[: int(length)]]
            found[number] = generator.reply(own_ids, None if math.isnan(log_probability) else log_probability)
    return found, stop_signal
