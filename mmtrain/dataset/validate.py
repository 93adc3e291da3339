"""The check of every sample before the first step."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mmtrain.checks.findings import REFUSED
from mmtrain.config.data_section import Data
from mmtrain.dataset.encoding_spec import EncodingSpec
from mmtrain.dataset.plan import Indices
from mmtrain.dataset.samples import StoredSamples
from mmtrain.dataset.selection import Choice, Side, select
from mmtrain.dataset.store import open_store
from mmtrain.dataset.store_file import EncodedStore
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.errors import UserError
from mmtrain.progress import QUIET, Progress
from mmtrain.records.record_set import RecordSet
from mmtrain.safe_text import counted

LeftOut = tuple[int, str]
"""The index of a sample, and why it is not used."""


@dataclass(frozen=True, slots=True)
class LengthLimit:
    """How long a sample may be, and what says so."""

    num_tokens: int
    source: str

    def reason(self, num_tokens: int, num_image_tokens: int = 0) -> str:
        """Why a sample of `num_tokens`, of which so many are placeholders of images, is too long."""
        images = f" ({num_image_tokens:,} of images: model.image_processor can make them smaller)"
        of_images = images if 2 * num_image_tokens > num_tokens else ""
        return f"{num_tokens:,} tokens{of_images}, over the {self.num_tokens:,} allowed ({self.source})"


@dataclass(frozen=True, slots=True)
class FaultPolicy:
    """What happens to samples that cannot be used, as the config says."""

    too_long: str = "error"
    on_fault: str = "error"
    max_skipped: int | float = 0
    """A number of samples, or below 1 a share of them."""
    read_before: int = 0
    """Samples that a stream has read before, over all epochs."""
    skipped_before: int = 0
    """Of these, the ones that it skipped."""
    epochs: int = 1
    """In each of which a number of samples may be skipped."""

    @classmethod
    def of(cls, data: Data) -> "FaultPolicy":
        return cls(data.too_long, data.on_fault, data.max_skipped)

    def too_many(self, num_faulty: int, num_samples: int) -> str | None:
        """Why so many samples may not be skipped, None where they may."""
        num_faulty, num_samples = num_faulty + self.skipped_before, num_samples + self.read_before
        allowed = int(self.max_skipped * (num_samples if isinstance(self.max_skipped, float) else self.epochs))
        if num_faulty <= allowed:
            return None
        return (
            f"data.max_skipped: {num_faulty:,} of {num_samples:,} samples have faults, over the {allowed:,} that "
            "may be skipped: correct them, or raise it"
        )

    def advice(self, num_faulty: int, num_samples: int) -> str | None:
        """What to do about samples with faults that were not skipped."""
        if self.on_fault == "skip":
            return self.too_many(num_faulty, num_samples)
        if num_faulty == num_samples:
            return None
        return (
            f"data.on_fault: {num_faulty:,} of {num_samples:,} samples have faults: correct them, or set it to skip to "
            "leave them out"
        )


@dataclass(frozen=True, slots=True)
class SampleSizes:
    """The sizes of some samples, by which steps are cut; 0 where a sample is not used."""

    num_tokens: npt.NDArray[np.int32]
    """(num_samples,)"""
    num_supervised: npt.NDArray[np.int32]
    """(num_samples,)"""
    sum_weights: npt.NDArray[np.float64]
    """(num_samples,) the sum of the weights of its supervised tokens"""
    num_image_tokens: npt.NDArray[np.int32]
    """(num_samples,) placeholders of its images"""
    image_token_pairs: npt.NDArray[np.float64]
    """(num_samples,) the sum of the squares of its images' placeholders: what attention among them costs"""

    def where(self, is_used: npt.NDArray[np.bool_]) -> dict[str, Any]:
        """The same by name, 0 where a sample is not used."""
        return {field.name: np.where(is_used, getattr(self, field.name), 0) for field in fields(SampleSizes)}

    @classmethod
    def joined(cls, each: Sequence["SampleSizes"]) -> "SampleSizes":
        """Those of all, one after the other."""
        return cls(*(np.concatenate([getattr(one, field.name) for one in each]) for field in fields(cls)))


@dataclass(frozen=True, slots=True)
class CheckedSamples(SampleSizes):
    """What the check of samples found: which ones are used, and the sizes of all."""

    num_images: int
    image_files: frozenset[Path]
    dropped: tuple[LeftOut, ...] = ()
    """The samples that are too long."""
    skipped: tuple[LeftOut, ...] = ()
    """The samples that have a fault."""
    duplicates: tuple[LeftOut, ...] = ()
    """The samples that are the same as an earlier one."""
    num_other_side: int = 0
    """Samples that are held out of training; in an evaluation set those that are trained on."""
    num_over_max: int = 0
    """Samples that are left out by `max_samples`."""

    @property
    def left_out(self) -> list[LeftOut]:
        """The samples that are left out for what they are, in order."""
        return sorted([*self.dropped, *self.skipped, *self.duplicates])

    @property
    def used(self) -> Indices:
        return np.flatnonzero(self.num_tokens)

    def sizes(self, samples: Indices | Sequence[int]) -> SampleSizes:
        """Of these samples, by index."""
        return SampleSizes(*(getattr(self, field.name)[samples] for field in fields(SampleSizes)))


def check_samples(
    spec: EncodingSpec,
    processor: ChatProcessor,
    limit: LengthLimit,
    policy: FaultPolicy | None = None,
    progress: Progress = QUIET,
    choices: Sequence[Choice] = (),
) -> tuple[StoredSamples, CheckedSamples]:
    """Every sample of `spec`, encoded once.

    `choices`: which samples of each source are used; without it all.
    Raises UserError naming the file, the line and the reason of every sample that cannot be used, except those that
    `policy` drops or skips; without it all of them.
    """
    policy = policy or FaultPolicy()
    records = spec.records()
    samples = StoredSamples.of(records, open_store(spec, records, processor, progress))
    checked = check_stored(samples, limit, policy)
    if not checked.num_tokens.any():
        raise nothing_left(samples.records, list(checked.dropped), list(checked.skipped))
    return samples, _selected(samples, checked, choices)


def check_stored(samples: StoredSamples, limit: LengthLimit, policy: FaultPolicy) -> CheckedSamples:
    """What `policy` leaves of samples that are encoded, perhaps nothing. Raises UserError as `check_samples` does."""
    store = samples.store
    faults = [(one.index, one.reason if one.kind == REFUSED else f"{one.kind}: {one.reason}") for one in store.faults]
    faulty = {index for index, _ in faults}
    over = [i for i in np.flatnonzero(store.num_tokens > limit.num_tokens).tolist() if i not in faulty]
    long = [(index, limit.reason(store.num_tokens[index], store.num_placeholders(index))) for index in over]
    return _without(store, *leave_out(samples.records, faults, long, policy))


def leave_out(
    records: RecordSet, faults: list[LeftOut], long: list[LeftOut], policy: FaultPolicy
) -> tuple[list[LeftOut], list[LeftOut]]:
    """The samples that `policy` drops as too long and those that it skips because of faults.

    Raises UserError with every other sample that has a fault or is too long.
    """
    skipped = _skipped(faults, len(records), policy)
    refused = [] if skipped else faults
    if policy.too_long != "drop":
        refused = refused + [(index, f"{reason}; or set data.too_long to drop") for index, reason in long]
    if refused:
        faulty = {index for index, _ in faults}
        advice = policy.advice(len(faulty), len(records)) if faults else None
        lines = [f"{records.place(index)}: {reason}" for index, reason in sorted(refused)]
        raise UserError([*lines, *([advice] if advice else [])])
    return long, skipped


def nothing_left(records: RecordSet, dropped: list[LeftOut], skipped: list[LeftOut]) -> UserError:
    """The error where no sample is left."""
    reasons = sorted([*dropped, *skipped])
    return UserError([f"{records.place(index)}: dropped, no sample is left: {reason}" for index, reason in reasons])


def _selected(samples: StoredSamples, checked: CheckedSamples, choices: Sequence[Choice]) -> CheckedSamples:
    """`checked` without what `choices` leave out. Raises UserError where nothing is left."""
    if all(choice == Choice() for choice in choices):
        return checked
    found = select(samples, checked.used, choices)
    is_used = ~np.isin(np.arange(len(samples)), found.indices)
    left = replace(
        checked,
        **checked.where(is_used),
        num_images=int(samples.store.num_images[is_used & (checked.num_tokens > 0)].sum()),
        duplicates=found.duplicates,
        num_other_side=len(found.other_side),
        num_over_max=len(found.over_max),
    )
    if not len(left.used):
        side = "training" if any(choice.side is Side.TRAINING for choice in choices) else "evaluation"
        raise UserError(
            f"data.eval: of {counted(len(checked.used), 'sample')} that can be used none is left for {side}: "
            "change `share`, or add data"
        )
    return left


def _skipped(faults: list[LeftOut], num_samples: int, policy: FaultPolicy) -> list[LeftOut]:
    """The samples with faults, each with all its reasons, where `policy` skips them."""
    by_sample: dict[int, list[str]] = {}
    for index, reason in faults:
        by_sample.setdefault(index, []).append(reason)
    if policy.on_fault != "skip" or policy.too_many(len(by_sample), num_samples):
        return []
    return [(index, "; ".join(reasons)) for index, reasons in sorted(by_sample.items())]


def _without(store: EncodedStore, dropped: list[LeftOut], skipped: list[LeftOut]) -> CheckedSamples:
    is_used = np.ones(len(store.num_tokens), np.bool_)
    is_used[[index for index, _ in (*dropped, *skipped)]] = False
    sample_of_image = np.repeat(np.arange(len(store.num_tokens)), store.num_images)
    placeholders = store.spans[:, 2].astype(np.float64)
    image_tokens, pairs = (
        np.bincount(sample_of_image, values, minlength=len(is_used)) for values in (placeholders, placeholders**2)
    )
    of_all = SampleSizes(
        store.num_tokens,
        store.num_supervised,
        store.sum_weights,
        image_tokens.astype(np.int32),
        pairs.astype(np.float64),
    )
    return CheckedSamples(
        **of_all.where(is_used),
        num_images=int(store.num_images[is_used].sum()),
        image_files=frozenset(store.image_files),
        dropped=tuple(dropped),
        skipped=tuple(skipped),
    )
