"""What the training and the evaluation data of a config have in common."""

from dataclasses import dataclass

import numpy as np

from mmtrain.config import Config
from mmtrain.dataset.encode_all import EncodingSpec
from mmtrain.dataset.plan import Indices
from mmtrain.dataset.samples import StoredSamples
from mmtrain.dataset.selection import content_keys, sample_keys, select
from mmtrain.dataset.store import open_store
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.inspect_labels.chosen import selected_sources
from mmtrain.progress import Progress

NUM_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Overlap:
    """Images are compared by their bytes, samples by their tokens, their labels and the bytes of their images."""

    num_train_images: int
    """Distinct ones."""
    num_eval_images: int
    """Distinct ones."""
    num_shared_images: int
    num_shared_samples: int
    """Evaluation samples that are also training samples."""
    shared_samples: tuple[tuple[str, str], ...]
    """The places of the first ones, in the evaluation data and in the training data."""

    @property
    def image_share(self) -> float:
        """The share of the training images that are also in the evaluation data."""
        return self.num_shared_images / self.num_train_images if self.num_train_images else 0.0


def find_overlap(config: Config, processor: ChatProcessor, progress: Progress) -> Overlap:
    """Raises UserError where a source cannot be read."""
    train, train_used = _used_samples(config, "train", processor, progress)
    evaluation, eval_used = _used_samples(config, "eval", processor, progress)
    train_images, eval_images = _images(train, train_used), _images(evaluation, eval_used)
    first: dict[tuple[bytes, ...], int] = {}
    for index, key in sample_keys(train, train_used.tolist()).items():
        first.setdefault(key, index)
    shared = [(index, first[key]) for index, key in sample_keys(evaluation, eval_used.tolist()).items() if key in first]
    places = [(str(evaluation.place(index)), str(train.place(other))) for index, other in shared[:NUM_SHOWN]]
    return Overlap(len(train_images), len(eval_images), len(train_images & eval_images), len(shared), tuple(places))


def _used_samples(
    config: Config, split: str, processor: ChatProcessor, progress: Progress
) -> tuple[StoredSamples, Indices]:
    selected = selected_sources(config, split)
    spec = EncodingSpec.of(config, selected.sources)
    records = spec.records()
    samples = StoredSamples(records, open_store(spec, records, processor, progress))
    possible = np.flatnonzero(samples.store.num_tokens)
    return samples, np.setdiff1d(possible, select(samples, possible, selected.choices).indices)


def _images(samples: StoredSamples, used: Indices) -> set[bytes]:
    """A SHA-256 of each image."""
    with_images = used[samples.store.num_images[used] > 0]
    return {key for keys in content_keys(samples, with_images.tolist()).values() for key in keys}
