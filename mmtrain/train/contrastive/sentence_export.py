"""The files by which sentence-transformers loads an exported embedder, checked before they are kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor

from mmtrain.config import Config
from mmtrain.contrastive.embedder import EncodedItem
from mmtrain.contrastive.sentence_folder import delete_sentence_files, name_processor, write_sentence_files
from mmtrain.contrastive.sentence_reading import sentence_embedding
from mmtrain.encoding.directory import model_directory, processor_class
from mmtrain.encoding.images import decode
from mmtrain.model.components import base_model
from mmtrain.safe_text import one_line
from mmtrain.train.contrastive.pair_dataset import PairDataset
from mmtrain.train.contrastive.step import ContrastiveLearner


@dataclass(frozen=True, slots=True)
class SentenceExport:
    """What came of it."""

    is_written: bool
    line: str


def add_sentence_files(
    folder: Path,
    learner: ContrastiveLearner,
    config: Config,
    dataset: PairDataset,
    items: Sequence[EncodedItem],
    embeddings: Sequence[Tensor],
    tolerance: float,
) -> SentenceExport:
    """Write them into `folder`, and compare what they give for the first pair, whose `items` are these, with its
    `embeddings`. Where a unit vector differs by more than `tolerance` they are deleted, and the line says so.

    Raises OSError.
    """
    embedder = learner.embedder
    # of several instructions none is the default: the user names one
    prompts = {side: next(iter(own)) if len(own) == 1 else "" for side, own in dataset.train.instructions.items()}
    write_sentence_files(folder, embedder.sentence_modules, embedder.width, prompts)
    if isinstance(learner.model, PeftModel) and "image" in embedder.sentence_modules.methods:
        directory = model_directory(config.model.path)
        name_processor(folder, processor_class(directory, learner.model.config).__name__)
    try:
        difference = _difference(folder, learner, dataset, items, embeddings)
    except Exception as error:  # a family's processor and model can raise anything
        reason = f"the model refuses its inputs: {one_line(error)}"
    else:
        if difference <= tolerance:
            return SentenceExport(True, f"by the files for sentence-transformers, by {difference:.1e}")
        reason = f"its embeddings would differ by {difference:.1e}"
    delete_sentence_files(folder)
    return SentenceExport(False, f"sentence-transformers cannot load it: {reason}")


def _difference(
    folder: Path,
    learner: ContrastiveLearner,
    dataset: PairDataset,
    items: Sequence[EncodedItem],
    embeddings: Sequence[Tensor],
) -> float:
    pair = dataset.train.records.pair(int(dataset.used[0]))
    model: Any = base_model(learner.model)
    found = []
    for item, encoded, expected in zip(pair.items, items, embeddings, strict=False):
        images = [decode(span.image) for span in encoded.encoded.images]
        with learner.runtime.autocast():
            own = sentence_embedding(folder, model, learner.embedder.processor, item, images)
        found.append(float((own - F.normalize(expected, dim=0)).norm()))
    return max(found)
