"""The pairs of some sources that a config uses: all, or one side of a split."""

from collections.abc import Sequence

from mmtrain.config.data_section import Data, EvalSource
from mmtrain.contrastive.embedder import Embedder
from mmtrain.contrastive.pair_samples import PairSamples, read_pairs
from mmtrain.dataset.hashes import image_hashes
from mmtrain.dataset.selection import Keys, SelectedSources, other_side
from mmtrain.dataset.validate import FaultPolicy
from mmtrain.errors import UserError
from mmtrain.progress import Progress


def read_selected(
    selected: SelectedSources, embedder: Embedder, data: Data, progress: Progress, policy: FaultPolicy | None = None
) -> PairSamples:
    """The pairs that `selected` uses, read as by `read_pairs`. Pairs that have a text or an image in common, directly
    or through others, are on one side of a split.

    Raises UserError as there, and where no pair can be held out.
    """
    samples = read_pairs(selected.sources, embedder, data, progress, policy)
    other = other_side(samples.records, samples.used, selected.choices, lambda indices: _split_keys(samples, indices))
    if not len(other):
        return samples
    if len(other) == len(samples.used):
        raise UserError(
            "data.eval: from: train: no pair can be held out, because all have texts or images in common, directly or "
            "through others: give data.eval a file"
        )
    return samples.without(other.tolist())


def read_evaluation_pairs(
    sources: Sequence[EvalSource], embedder: Embedder, data: Data, progress: Progress
) -> tuple[PairSamples, tuple[str, ...]]:
    """The pairs of evaluation sources, and the name in reports of each source of their records. Raises UserError as
    `read_selected` does."""
    selected = SelectedSources.for_evaluation(data, sources)
    return read_selected(selected, embedder, data, progress), selected.names


def _split_keys(samples: PairSamples, indices: Sequence[int]) -> Keys:
    """By sample, a SHA-256 of each of its images, and of each of its items."""
    loaded = {index: samples.loaded(samples.pairs[index].numbers) for index in indices}
    sources = (span.image.source for items in loaded.values() for item in items for span in item.encoded.images)
    hash_of = image_hashes(sources)
    return {
        index: tuple(
            bytes.fromhex(key)
            for item in items
            for key in (item.key, *(hash_of[span.image.source] for span in item.encoded.images))
        )
        for index, items in loaded.items()
    }
