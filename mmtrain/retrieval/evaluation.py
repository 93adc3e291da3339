"""The pairs of a config's evaluation sources, a model's embeddings of their items, and the figures of both."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmtrain.config import Config
from mmtrain.config.data_section import EvalSource
from mmtrain.contrastive.embed_all import embed_all
from mmtrain.contrastive.embedder import Embedder, EncodedItem
from mmtrain.contrastive.relation import relate
from mmtrain.contrastive.selected_pairs import read_evaluation_pairs
from mmtrain.dataset.plan import Indices
from mmtrain.errors import UserError
from mmtrain.model.load import ANY_LENGTH
from mmtrain.progress import Progress
from mmtrain.records.chat import SampleError, refused_at
from mmtrain.retrieval.figures import Direction, directions, figures
from mmtrain.retrieval.item_content import ItemContent
from mmtrain.retrieval.zero_shot import Classes, labels, zero_shot_figures
from mmtrain.runtime.processes import Runtime
from mmtrain.safe_text import shown


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Unit vectors of one model."""

    items: torch.Tensor
    """(num_items, dim)"""
    classes: torch.Tensor | None
    """(num_classes, dim)"""


class RetrievalEvaluation:
    """The pairs of `sources`, all of them together and each source alone."""

    def __init__(
        self,
        config: Config,
        sources: Sequence[EvalSource],
        embedder: Embedder,
        progress: Progress,
        classes: Classes | None = None,
    ) -> None:
        """`embedder` encodes the items. Raises UserError where a sample cannot be used."""
        self.samples, self._names = read_evaluation_pairs(sources, embedder, config.data, progress)
        self._max_tokens = config.run.microbatch_tokens
        self._progress = progress
        used = self.samples.used
        self.content = ItemContent.of(self.samples, used.tolist())
        self._ways = self._directions(used)
        self._classes = classes
        self._labels = None if classes is None else labels(self.samples, used, classes)
        self._class_items = [] if classes is None else _encoded(embedder, classes)

    @property
    def way_names(self) -> tuple[str, ...]:
        """The directions in which the pairs are searched, such as `image_to_text`."""
        return tuple(way.name for way in self._ways)

    def embed(self, embedder: Embedder) -> Embeddings:
        """Raises UserError where an image no longer decodes."""
        of_items = self._embed_items(embedder, (0, 1))
        of_texts = None if self._classes is None else self._embed_classes(embedder)
        classes = None if of_texts is None or self._classes is None else self._classes.embeddings(of_texts)
        return Embeddings(of_items, classes)

    def embed_together(self, embedder: Embedder, runtime: Runtime) -> Embeddings | None:
        """The same without classes, each process embedding some of the items: all get the bits that one would. None
        where a signal asked all processes to stop. Raises UserError as above."""
        own = self._embed_items(embedder, (runtime.index, runtime.num_processes))
        total, stop_signal = runtime.agree(own.double().flatten())
        return None if stop_signal is not None else Embeddings(total.float().view_as(own), None)

    def _embed_items(self, embedder: Embedder, share: tuple[int, int]) -> torch.Tensor:
        samples = self.samples
        with refused_at("eval retrieval"):
            return embed_all(embedder, samples.items, samples.loaded, self._max_tokens, self._progress, share)

    def _embed_classes(self, embedder: Embedder) -> torch.Tensor:
        items = self._class_items
        return embed_all(embedder, items, lambda at: [items[position] for position in at], self._max_tokens)

    def figures(self, own: Embeddings, base: Embeddings | None = None) -> dict[str, Any]:
        """Every figure of the report."""
        of_base = None if base is None else base.items
        zero_shot = self._zero_shot(own)
        if zero_shot is not None and base is not None:
            zero_shot["base"] = self._zero_shot(base)
        return {
            **figures(self.content, self._ways, own.items, of_base),
            "zero_shot": zero_shot,
            "num_samples": len(self.samples.used),
            "sources": self._sources(own.items, of_base),
            "dropped": [
                {"place": str(self.samples.place(index)), "reason": reason} for index, reason in self.samples.left_out
            ],
        }

    def _directions(self, indices: Indices) -> tuple[Direction, ...]:
        relation = relate([self.samples.pairs[index] for index in indices.tolist()])
        return directions(self.samples.items, relation)

    def _sources(self, own: torch.Tensor, base: torch.Tensor | None) -> dict[str, Any]:
        """The figures of each source alone, its items being the only candidates, where there are several."""
        if len(set(self._names)) < 2:
            return {}
        used = self.samples.used
        source_of = self.samples.records.sources_of(used)
        found = {}
        for name in dict.fromkeys(self._names):
            numbers = [number for number, other in enumerate(self._names) if other == name]
            if len(indices := used[np.isin(source_of, numbers)]):
                found[name] = figures(self.content, self._directions(indices), own, base)
        return found

    def _zero_shot(self, found: Embeddings) -> dict[str, Any] | None:
        if self._classes is None or self._labels is None or found.classes is None:
            return None
        images, pairs = self._labels
        return zero_shot_figures(found.items[images], found.classes, pairs, self._classes)


def _encoded(embedder: Embedder, classes: Classes) -> list[EncodedItem]:
    """The texts of the classes. Raises UserError where one cannot be embedded."""
    items, limit = classes.items(), embedder.limit(ANY_LENGTH)
    made: list[EncodedItem] = []
    for item, one in zip(items, embedder.encode([(item, Path()) for item in items]), strict=True):
        if isinstance(one, SampleError):
            raise UserError(f"--classes: {shown(item.text)}: {one}")
        if len(one.encoded.ids) > limit.num_tokens:
            raise UserError(f"--classes: {shown(item.text)}: {limit.reason(len(one.encoded.ids))}")
        made.append(replace(one, key=item.content_key([])))
    return made
