"""What the training and the evaluation data of a config have in common."""

from dataclasses import dataclass

from mmtrain.config import Config
from mmtrain.dataset.plan import Indices
from mmtrain.dataset.samples import StoredSamples
from mmtrain.dataset.selection import image_keys, sample_keys
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.inspect_labels.selected_samples import open_selected
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
    both = [open_selected(config, split, processor, progress) for split in ("train", "eval")]
    (train, train_used), (evaluation, eval_used) = [(one.samples, one.used) for one in both]
    train_images, eval_images = _images(train, train_used), _images(evaluation, eval_used)
    first: dict[tuple[bytes, ...], int] = {}
    for index, key in sample_keys(train, train_used.tolist()).items():
        first.setdefault(key, index)
    shared = [(index, first[key]) for index, key in sample_keys(evaluation, eval_used.tolist()).items() if key in first]
    places = [(str(evaluation.place(index)), str(train.place(other))) for index, other in shared[:NUM_SHOWN]]
    return Overlap(len(train_images), len(eval_images), len(train_images & eval_images), len(shared), tuple(places))


def _images(samples: StoredSamples, used: Indices) -> set[bytes]:
    """A SHA-256 of each image."""
    with_images = used[samples.store.num_images[used] > 0]
    return {key for keys in image_keys(samples, with_images.tolist()).values() for key in keys}
