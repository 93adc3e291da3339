"""Embeddings without gradients: of any number of items, in batches of one kind."""

from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
import torch.nn.functional as F

from mmtrain.contrastive.embedder import Embedder, EncodedItem
from mmtrain.progress import QUIET, Progress


def embed_all(
    embedder: Embedder,
    items: Sequence[EncodedItem],
    load: Callable[[Sequence[int]], Sequence[EncodedItem]],
    max_tokens: int,
    progress: Progress = QUIET,
    share: tuple[int, int] = (0, 1),
) -> torch.Tensor:
    """(num_items, width) unit vectors in float32 on the CPU.

    `load`: items by position, with their images. `max_tokens`: of a batch with more than one item, padding included.
    `share`: the index of a process, and how many share the batches, which do not depend on it; the rows of other
    processes' items are zero.
    Raises SampleError where an image does not decode.
    """
    found = torch.zeros(len(items), embedder.width)
    index, num_processes = share
    batches = list(_batches(items, 1 if embedder.alone else max_tokens))[index::num_processes]
    with torch.no_grad(), progress.task("embeddings", sum(map(len, batches))) as task:
        for batch in batches:
            embeddings = embedder.embed(embedder.batch(load(batch)), items[batch[0]].kind)
            found[batch] = F.normalize(embeddings, dim=-1).cpu()
            task.advance(len(batch))
    return found


def _batches(items: Sequence[EncodedItem], max_tokens: int) -> Iterator[list[int]]:
    """Positions of items of one kind, the longest first."""
    order = sorted(range(len(items)), key=lambda position: (items[position].kind, -items[position].row_tokens))
    for _, group in groupby(order, key=lambda position: items[position].kind):
        batch: list[int] = []
        for position in group:
            if batch and (len(batch) + 1) * items[batch[0]].row_tokens > max_tokens:
                yield batch
                batch = []
            batch.append(position)
        yield batch
