"""The check of every sample before the first step."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mmtrain.checks.findings import REFUSED
from mmtrain.dataset.encode_all import Recipe
from mmtrain.dataset.samples import Indices, SampleSet
from mmtrain.dataset.store import Store, open_store
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.errors import UserError


@dataclass(frozen=True, slots=True)
class LengthLimit:
    """How long a sample may be, and what says so."""

    num_tokens: int
    source: str

    def reason(self, num_tokens: int) -> str:
        """Why a sample of `num_tokens` is too long."""
        return f"{num_tokens:,} tokens, over the {self.num_tokens:,} allowed ({self.source})"


@dataclass(slots=True)
class Checked:
    """What the check of a sample set found: the lengths by which steps are cut, and what stays out."""

    num_tokens: npt.NDArray[np.int32]
    """(num_samples,) 0 where the sample is not used."""
    num_supervised: npt.NDArray[np.int32]
    """(num_samples,) also 0 there, as what follows."""
    num_image_tokens: npt.NDArray[np.int32]
    """(num_samples,) placeholders of its pictures"""
    image_token_pairs: npt.NDArray[np.float64]
    """(num_samples,) the sum of the squares of its pictures' placeholders: what attention among them costs"""
    num_images: int
    picture_files: set[Path]
    dropped: list[tuple[int, str]] = field(default_factory=list)

    @property
    def used(self) -> Indices:
        return np.flatnonzero(self.num_tokens)


def check_samples(
    recipe: Recipe,
    processor: ChatProcessor,
    limit: LengthLimit,
    too_long: str = "error",
    advance: Callable[[int], None] = lambda number: None,
    tick: Callable[[], None] = lambda: None,
) -> tuple[SampleSet, Checked]:
    """The set that `recipe` gives, every sample of it encoded once. `advance` and `tick`: see `open_store`.

    Raises UserError naming the file, the line and the reason of every sample that cannot be used; one that is too
    long is dropped instead where `too_long` says so.
    """
    samples = recipe.samples(processor)
    store = open_store(recipe, samples, advance, tick)
    faults = [(index, reason if kind == REFUSED else f"{kind}: {reason}") for index, kind, reason in store.faults]
    dropped: list[tuple[int, str]] = []
    for index in np.flatnonzero(store.num_tokens > limit.num_tokens).tolist():
        reason = limit.reason(store.num_tokens[index])
        if too_long == "drop":
            dropped.append((index, reason))
        else:
            faults.append((index, f"{reason}; or set data.too_long to drop"))
    if faults:
        raise UserError([f"{samples.place(index)}: {reason}" for index, reason in sorted(faults)])
    checked = _checked(store, dropped)
    if not checked.num_tokens.any():
        raise UserError([f"{samples.place(index)}: dropped, no sample is left: {reason}" for index, reason in dropped])
    samples.use(store)
    return samples, checked


def _checked(store: Store, dropped: list[tuple[int, str]]) -> Checked:
    stays_out = np.zeros(len(store.num_tokens), np.bool_)
    stays_out[[index for index, _ in dropped]] = True
    of_sample = np.repeat(np.arange(len(store.num_tokens)), store.num_pictures)
    placeholders = store.spans[:, 2].astype(np.float64)
    image_tokens, pairs = (
        np.bincount(of_sample, values, minlength=len(stays_out)) for values in (placeholders, placeholders**2)
    )
    found = [np.where(stays_out, 0, v) for v in (store.num_tokens, store.num_supervised, image_tokens, pairs)]
    num_images = int(store.num_pictures[~stays_out].sum())
    return Checked(found[0], found[1], found[2].astype(np.int32), found[3], num_images, store.picture_files, dropped)
