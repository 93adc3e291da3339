"""The check of every sample before the first step."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mmtrain.checks.findings import REFUSED
from mmtrain.dataset.encode_all import EncodingSpec
from mmtrain.dataset.plan import Indices
from mmtrain.dataset.samples import StoredSamples
from mmtrain.dataset.store import open_store
from mmtrain.dataset.store_file import EncodedStore
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.errors import UserError
from mmtrain.progress import QUIET, Progress


@dataclass(frozen=True, slots=True)
class LengthLimit:
    """How long a sample may be, and what says so."""

    num_tokens: int
    source: str

    def reason(self, num_tokens: int) -> str:
        """Why a sample of `num_tokens` is too long."""
        return f"{num_tokens:,} tokens, over the {self.num_tokens:,} allowed ({self.source})"


@dataclass(frozen=True, slots=True)
class CheckedSamples:
    """What the check of samples found: which ones are used, and their sizes, by which steps are cut."""

    num_tokens: npt.NDArray[np.int32]
    """(num_samples,) 0 where the sample is not used, as in all of these."""
    num_supervised: npt.NDArray[np.int32]
    """(num_samples,)"""
    num_image_tokens: npt.NDArray[np.int32]
    """(num_samples,) placeholders of its images"""
    image_token_pairs: npt.NDArray[np.float64]
    """(num_samples,) the sum of the squares of its images' placeholders: what attention among them costs"""
    num_images: int
    image_files: frozenset[Path]
    dropped: tuple[tuple[int, str], ...] = ()
    """Sample index and reason of each sample that is left out as too long."""

    @property
    def used(self) -> Indices:
        return np.flatnonzero(self.num_tokens)


def check_samples(
    spec: EncodingSpec,
    processor: ChatProcessor,
    limit: LengthLimit,
    too_long: str = "error",
    progress: Progress = QUIET,
) -> tuple[StoredSamples, CheckedSamples]:
    """Every sample of `spec`, encoded once.

    Raises UserError naming the file, the line and the reason of every sample that cannot be used; one that is too
    long is dropped instead where `too_long` is "drop".
    """
    records = spec.records()
    store = open_store(spec, records, processor, progress)
    faults = [(one.index, one.reason if one.kind == REFUSED else f"{one.kind}: {one.reason}") for one in store.faults]
    over = np.flatnonzero(store.num_tokens > limit.num_tokens).tolist()
    long = [(index, limit.reason(store.num_tokens[index])) for index in over]
    if too_long != "drop":
        faults += [(index, f"{reason}; or set data.too_long to drop") for index, reason in long]
    if faults:
        raise UserError([f"{records.place(index)}: {reason}" for index, reason in sorted(faults)])
    checked = _without(store, long)
    if not checked.num_tokens.any():
        raise UserError([f"{records.place(index)}: dropped, no sample is left: {reason}" for index, reason in long])
    return StoredSamples(records, store), checked


def _without(store: EncodedStore, dropped: list[tuple[int, str]]) -> CheckedSamples:
    is_dropped = np.zeros(len(store.num_tokens), np.bool_)
    is_dropped[[index for index, _ in dropped]] = True
    sample_of_image = np.repeat(np.arange(len(store.num_tokens)), store.num_images)
    placeholders = store.spans[:, 2].astype(np.float64)
    image_tokens, pairs = (
        np.bincount(sample_of_image, values, minlength=len(is_dropped)) for values in (placeholders, placeholders**2)
    )
    return CheckedSamples(
        np.where(is_dropped, 0, store.num_tokens),
        np.where(is_dropped, 0, store.num_supervised),
        np.where(is_dropped, 0, image_tokens).astype(np.int32),
        np.where(is_dropped, 0, pairs),
        int(store.num_images[~is_dropped].sum()),
        frozenset(store.image_files),
        tuple(dropped),
    )
