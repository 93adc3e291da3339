"""Texts made comparable: as they were written, by the rules of VQA, and by those of SQuAD."""

import re
import string
import unicodedata

_ARTICLES = frozenset({"a", "an", "the"})
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_AS_DIGIT = {word: str(number) for number, word in enumerate(_NUMBER_WORDS)} | {"none": "0"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_CONTRACTIONS = re.findall(
    r"\S+",
    """
    ain't aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't
    oughtn't shan't shouldn't wasn't weren't won't wouldn't could've might've must've not've should've they've
    we've what've where've who've would've you've ma'am o'clock 'twas y'all he'd he's how'd how'll how's it'd
    it'll somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd
    there're there's they'd they'll they're what'll what're what's when's where'd where's who'd who'll who's
    why'll why're why's you'd you'll you're couldn't've hadn't've mightn't've shouldn't've wouldn't've he'd've
    it'd've she'd've somebody'd've someone'd've something'd've there'd've they'd've we'd've who'd've you'd've
    'ow's'at y'all'll y'all'd've
    """,
)
"""Those of the authors' script (github.com/GT-Vision-Lab/VQA, vqaEval.py), where one apostrophe may be missing."""
_DIGITS_WITH_COMMA = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")


_AS_CONTRACTION = {
    word[:at] + word[at + 1 :]: word for word in _CONTRACTIONS for at, letter in enumerate(word) if letter == "'"
}


def as_written(text: str) -> str:
    """`text` in Unicode's composed form (NFC), its white space as single spaces, none at the ends."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def vqa_normalized(text: str) -> str:
    """`text` by the rules of the VQA evaluation (Antol and others, VQA, 2015; visualqa.org/evaluation.html).

    A period goes unless a digit follows it. Other punctuation goes where a space is next to it, or where the text has a
    comma between digits, and otherwise becomes a space; apostrophes and colons stay. Then, in lower case, number words
    up to ten become digits, articles go, and contractions get their apostrophe back.
    """
    text = as_written(text)
    result, has_thousands = text, _DIGITS_WITH_COMMA.search(text) is not None
    for mark in _PUNCTUATION:
        is_at_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if is_at_space or has_thousands else " ")
    words = [_AS_DIGIT.get(word, word) for word in _PERIOD.sub("", result).lower().split()]
    return " ".join(_AS_CONTRACTION.get(word, word) for word in words if word not in _ARTICLES)


def squad_tokens(text: str) -> list[str]:
    """The words of `text` by the rules of SQuAD (Rajpurkar and others, SQuAD, 2016, section 6.1): in lower case,
    without ASCII punctuation and articles."""
    plain = as_written(text).lower().translate(str.maketrans("", "", string.punctuation))
    return [word for word in plain.split() if word not in _ARTICLES]
