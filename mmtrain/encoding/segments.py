"""Whole texts encoded in segments.

A tokenizer cuts its text at special tokens that take nothing of the text around them, and encodes what is between two
of them by itself. So the ids of a text are those of its segments one after the other, and what many texts have in
common is encoded once. Each such token is tried when it is first met, and the first text of every call is encoded whole
too: what differs is encoded whole from then on.
"""

import functools
import re
from collections.abc import Callable, Sequence

Encode = Callable[[Sequence[str], bool], list[list[int]]]
"""From whole texts, and whether special tokens are added to each, to ids."""
Known = dict[str, list[int]]
"""The ids of texts, each encoded by itself."""

_TRIED = ("word", " Word 12", "\n\nä ", "a:\n")


class SegmentEncoder:
    """Encodes whole texts with one tokenizer."""

    def __init__(self, encode: Encode, parting_tokens: re.Pattern[str]) -> None:
        self._encode = encode
        self._split = re.compile(f"({parting_tokens.pattern})").split
        self._is_exact = True
        self._token_ids = functools.cache(self._tried)
        self._prefix = functools.cache(self._added_before)

    def __call__(self, texts: Sequence[str], adds: bool, known: Known) -> list[list[int]]:
        """The ids of each text; `adds`: with the special tokens of the tokenizer. `known` has the ids of texts that
        were encoded before, and gets those of the segments."""
        prefix = self._prefix(adds)
        pieces = [self._split(text) for text in texts] if self._is_exact and prefix is not None else []
        tokens = {token for one in pieces for token in one[1::2]}
        if not pieces or not all(map(self._token_ids, tokens)):
            return self._encode(texts, adds)
        new = [text for text in {text for one in pieces for text in one[::2]} if text not in known]
        known |= zip(new, self._encode(new, False), strict=True)
        found = [self._joined(one, prefix or [], known) for one in pieces]
        if found[0] == self._encode(texts[:1], adds)[0]:
            return found
        self._is_exact = False
        return self._encode(texts, adds)

    def _joined(self, pieces: Sequence[str], prefix: list[int], known: Known) -> list[int]:
        ids = [*prefix, *known[pieces[0]]]
        for token, text in zip(pieces[1::2], pieces[2::2], strict=True):
            ids += self._token_ids(token)
            ids += known[text]
        return ids

    def _tried(self, token: str) -> list[int]:
        """The id of a token that takes nothing of the text around it; empty where it does."""
        alone, *own = self._encode([token, *_TRIED], False)
        around = self._encode([text + token + text for text in _TRIED], False)
        is_exact = len(alone) == 1 and around == [[*ids, *alone, *ids] for ids in own]
        return alone if is_exact else []

    def _added_before(self, adds: bool) -> list[int] | None:
        """What is put before every text, None where that is not all."""
        bare, made = self._encode(_TRIED, False), self._encode(_TRIED, adds)
        prefix = made[0][: len(made[0]) - len(bare[0])]
        return prefix if made == [[*prefix, *ids] for ids in bare] else None
