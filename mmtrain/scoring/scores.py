"""A model's figures for every answer that is trained on: all of `eval perplexity` is computed from them."""

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Scores:
    """A row for each answer that is trained on; all arrays are (num_answers,), ordered by sample, then by answer."""

    sample: Ints
    """The index of the sample."""
    source: Ints
    """The number of its source."""
    answer: Ints
    """Which of these answers of its conversation it is, counted from 1."""
    has_image: npt.NDArray[np.bool_]
    """Whether the sample has an image."""
    nll: Floats
    """Sum of the negative log-likelihoods of the answer's supervised tokens, in nats."""
    num_supervised: Ints
    """The answer's supervised tokens."""
    num_right: Ints
    """Of these, how many were the most likely."""
    num_bytes: Ints
    """Bytes of the answer's text in UTF-8."""
    weight: Floats
    """What each of the answer's tokens counts in the loss."""

    def of(self, indices: Ints) -> "Scores":
        """The rows of the samples `indices` alone."""
        return self.rows(np.isin(self.sample, indices))

    def rows(self, chosen: npt.NDArray[np.bool_] | npt.NDArray[np.intp]) -> "Scores":
        """Some of the rows, by a mask or in this order."""
        return Scores(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})
