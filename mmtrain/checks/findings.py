"""The kinds of faults of a sample, and of notes about it."""

from dataclasses import dataclass

IGNORED = -100
REFUSED = "refused"
UNCHECKED = "cannot be checked"
UNDECODABLE = "does not decode"
NO_LABEL = "no supervised token"
NOT_ITSELF = "label is another token"
PLACEHOLDER = "supervised placeholder"
NO_PLACEHOLDERS = "image without its placeholders"
PROMPT = "text before the reply is not inference's"
REPLY = "labels are not the assistant's reply"
NO_TEXT = "trained turn without supervised text"
NO_END = "trained turn without its end"
OUTSIDE = "supervised outside the trained turns"
MARK = "mark without an image"
LITERAL = "literal special token"
UNMARKED = "image without a mark"
WHITE_SPACE = "white space where a reply begins"
OTHER_END = "reply with another end token than the last reply"
ADDED_END = "end token that the template lacks"
LARGE = "image far larger than used"
CROPPED = "image cropped or stretched"


@dataclass(frozen=True, slots=True)
class Finding:
    """A fault of a sample, or a note: something that is right but worth knowing."""

    kind: str
    reason: str
    is_fault: bool

    @classmethod
    def fault(cls, kind: str, reason: str) -> "Finding":
        return cls(kind, reason, is_fault=True)

    @classmethod
    def note(cls, kind: str, reason: str) -> "Finding":
        return cls(kind, reason, is_fault=False)
