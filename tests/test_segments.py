"""Whole texts encoded in segments: the ids of the tokenizer, and each segment once."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from mmtrain.encoding.load import load_processor
from mmtrain.encoding.segments import Known, SegmentEncoder
from support.label_models import TEMPLATES, TOKENIZERS, make_directory

TEXTS = (
    "<|im_start|>user\nword<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\n  Ünd 12\t<|im_end|><|im_end|> x",
    "before<|im_start|> <|im_start|>a",
    "no token at all ",
    "",
)


@pytest.mark.parametrize("strips", [False, True])
@pytest.mark.parametrize("bos_in_front", [False, True])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_ids_are_those_of_whole_texts(name: str, bos_in_front: bool, strips: bool, tmp_path: Path) -> None:
    path = make_directory(tmp_path, name, TEMPLATES["chatml"].text, bos_in_front=bos_in_front, strips=strips)
    tokenizer = load_processor(str(path)).tokenizer
    for adds in (False, True):
        whole = [tokenizer.wrapped(text, add_special_tokens=adds)["input_ids"] for text in TEXTS]
        assert tokenizer.encode_in_segments(TEXTS, adds, {}) == whole


class Letters:
    """A tokenizer of letters with the token `<t>`, which counts what it encodes."""

    def __init__(self, pattern: str = "<t>|.") -> None:
        self.encoded: list[str] = []
        self._pattern = re.compile(pattern, re.DOTALL)

    def __call__(self, texts: Sequence[str], adds: bool) -> list[list[int]]:
        self.encoded += texts
        return [[7] * adds + [sum(map(ord, one)) for one in self._pattern.findall(text)] for text in texts]


def test_what_is_known_or_twice_in_the_texts_is_encoded_once() -> None:
    letters = Letters()
    encode = SegmentEncoder(letters, re.compile("<t>"))
    known: Known = {"ab": [97, 98]}
    encode(["<t>"], True, dict(known))
    letters.encoded.clear()
    token = sum(map(ord, "<t>"))
    found = encode(["<t>ab<t>c", "<t>c<t>c"], True, known)
    assert found == [[7, token, 97, 98, token, 99], [7, token, 99, token, 99]]
    assert sorted(letters.encoded) == ["", "<t>ab<t>c", "c"]  # the first text whole too


@pytest.mark.parametrize(
    "pattern",
    [
        r"<t>\s*|.",  # the token takes the white space after it
        r"z+<t>|<t>|.",  # it takes what no text of the trial has before it
    ],
)
def test_a_tokenizer_that_does_not_cut_there_gets_whole_texts(pattern: str) -> None:
    encode, texts = SegmentEncoder(Letters(pattern), re.compile("<t>")), ["zz<t> a", "z<t>z<t>"]
    assert encode(texts, False, {}) == Letters(pattern)(texts, False)
