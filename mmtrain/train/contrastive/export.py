"""Saves an embedder: a directory that transformers loads, or an adapter in peft's format; sentence-transformers loads
either.

What was saved is loaded back and must give the same embeddings and the same scale.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from mmtrain.atomic_files import replacing
from mmtrain.config import Config
from mmtrain.contrastive.embedder import Embedder, EncodedItem
from mmtrain.contrastive.load import reloaded
from mmtrain.errors import storage_faults
from mmtrain.model.load import auto_class
from mmtrain.train.contrastive.card import embedder_card
from mmtrain.train.contrastive.pair_dataset import PairDataset
from mmtrain.train.contrastive.sentence_export import add_sentence_files
from mmtrain.train.contrastive.step import ContrastiveLearner
from mmtrain.train.saving import MAX_DIFFERENCE, as_saved, save, saved_line, target_of


def export(
    learner: ContrastiveLearner, config: Config, dataset: PairDataset, name: str | None = None, step: int | None = None
) -> str:
    """Write the folder `name`, by default `adapter/` (or `model/` where nothing is LoRA), and load it back. Gives a
    line that says what was found. `step`: after which the weights are these; None: the last.

    The embeddings of the first pair's items are compared. Raises UserError where what was saved is not what was
    trained, and StorageError where it cannot be written.
    """
    target, tolerance = target_of(learner.model, config, name), MAX_DIFFERENCE[config.model.dtype]
    items = _first_items(dataset)
    with storage_faults(f"{target}: it cannot be written"), replacing(target) as made:
        save(learner.model, learner.embedder.processor, config, made)
        before = _embeddings(learner.embedder, items)
        found = add_sentence_files(made, learner, config, dataset, items, before, tolerance)
        (made / "README.md").write_text(_card(learner, config, dataset, found.is_written, step), encoding="utf-8")
    after = _loaded_back(learner, target, config, items)
    difference = max(_distance(one, other) for one, other in zip(after, before, strict=True))
    return f"{saved_line(target, difference, config, 'embeddings')}; {found.line}"


def _card(
    learner: ContrastiveLearner, config: Config, dataset: PairDataset, is_sentence: bool, step: int | None
) -> str:
    return embedder_card(
        config,
        auto_class=auto_class(learner.model.config).__name__,
        is_adapter=isinstance(learner.model, PeftModel),
        takes_images="image" in learner.embedder.sentence_modules.methods,
        num_pairs=len(dataset.used),
        instructions=dataset.train.instructions if is_sentence else None,
        step=step,
    )


def _first_items(dataset: PairDataset) -> list[EncodedItem]:
    return dataset.train.loaded(dataset.train.pairs[int(dataset.used[0])].numbers)


@torch.no_grad()
def _embeddings(embedder: Embedder, items: Sequence[EncodedItem]) -> list[Tensor]:
    """That of each item, and the model's own scale and bias."""
    numbers = [one.value.cpu() for one in (embedder.scale, embedder.bias) if one.parameter is not None]
    alone = [embedder.embed(embedder.batch([item]), item.kind)[0] for item in items]
    return [*alone, *numbers]


def _loaded_back(
    learner: ContrastiveLearner, target: Path, config: Config, items: Sequence[EncodedItem]
) -> list[Tensor]:
    embedder, model = learner.embedder, learner.model
    if isinstance(model, PeftModel):
        with as_saved(model, target):
            return _embeddings(embedder, items)
    return _embeddings(reloaded(embedder, str(target), config, learner.runtime), items)


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm().clamp_min(1e-6))
