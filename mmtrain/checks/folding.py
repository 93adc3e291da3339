"""The ids of a sample with each image folded to one placeholder, as its chat template writes it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mmtrain.checks.findings import IGNORED, NO_PLACEHOLDERS, PLACEHOLDER, Finding
from mmtrain.encoding.processor import ChatProcessor

Ids = npt.NDArray[np.integer[Any]]
"""(num_tokens,) the token ids of a sample, or its labels."""


def fold_images(
    ids: Ids, labels: Ids, sizes: Sequence[tuple[int, int]], processor: ChatProcessor
) -> tuple[Ids, Ids, list[Finding]]:
    """Ids and labels with one placeholder for each image, and the faults of the images' spans; `sizes` are
    their (width, height) in order. Raises SampleError where the processor takes no image of such a size."""
    image_id = processor.image_token_id or -1
    at, new_ids, new_labels, faults = 0, list[Ids](), list[Ids](), list[Finding]()
    of_images = processor.image_tokens(sizes)
    for number, (size, tokens) in enumerate(zip(sizes, of_images, strict=True), start=1):
        start = _find(ids, np.array(tokens.ids), at)
        if start is None:
            reason = f"image {number} of {size[0]}x{size[1]} should be {len(tokens.ids)} tokens in a row: not found"
            faults.append(Finding.fault(NO_PLACEHOLDERS, reason))
            continue
        end = start + len(tokens.ids)
        if supervised := np.count_nonzero(labels[start:end] != IGNORED):
            faults.append(Finding.fault(PLACEHOLDER, f"{supervised} tokens of image {number} are trained on"))
        new_ids += [ids[at:start], np.array([image_id])]
        new_labels += [labels[at:start], np.array([IGNORED])]
        at = end
    folded = np.concatenate([*new_labels, labels[at:]])
    if stray := np.count_nonzero(folded == image_id):
        faults.append(Finding.fault(PLACEHOLDER, f"{stray} placeholders outside every image are trained on"))
    return np.concatenate([*new_ids, ids[at:]]), np.where(folded == image_id, IGNORED, folded), faults


def _find(ids: Ids, run: Ids, at: int) -> int | None:
    starts = (at + np.flatnonzero(ids[at:] == run[0])).tolist()
    return next((start for start in starts if np.array_equal(ids[start : start + len(run)], run)), None)
