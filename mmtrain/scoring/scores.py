"""What a model gives for every learned answer: the numbers that all of `eval perplexity` is made of."""

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Scores:
    """A row for each learned answer; all arrays are (num_answers,), ordered by sample, then by answer."""

    sample: Ints
    """The number of the sample."""
    source: Ints
    """The number of its source."""
    answer: Ints
    """Which learned answer of its conversation it is, counted from 1."""
    has_image: npt.NDArray[np.bool_]
    """Whether the sample has a picture."""
    nll: Floats
    """Sum of the negative log-likelihoods of the answer's learned tokens, in nats."""
    num_supervised: Ints
    """The answer's learned tokens."""
    num_right: Ints
    """Of these, how many were the likeliest."""
    num_bytes: Ints
    """Bytes of the answer's words in UTF-8."""

    def of(self, numbers: Ints) -> "Scores":
        """The rows of the samples `numbers` alone."""
        kept = np.isin(self.sample, numbers)
        return Scores(**{field.name: getattr(self, field.name)[kept] for field in fields(self)})
