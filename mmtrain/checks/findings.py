"""What can be wrong with a sample, or right and yet worth knowing, by kind."""

from dataclasses import dataclass

IGNORED = -100
REFUSED = "refused"
UNCHECKED = "cannot be checked"
UNDECODABLE = "does not decode"
NO_LABEL = "no supervised token"
NOT_ITSELF = "label is not its token"
PLACEHOLDER = "supervised placeholder"
PICTURE = "image without its placeholders"
PROMPT = "text before the answer is not inference's"
WORDS = "labels are not the assistant's words"
NO_WORDS = "trained turn without supervised words"
NO_END = "trained turn without its end"
OUTSIDE = "supervised outside the trained turns"
MARK = "mark that no image stands for"
LITERAL = "literal special token"
WHITE_SPACE = "white space where an answer begins"
OTHER_END = "reply whose end is another token than the last one's"
ADDED_END = "end token that the template lacks"
LARGE = "image far larger than used"
CROPPED = "image cropped or stretched"


@dataclass(frozen=True, slots=True)
class Finding:
    """A fault, or a note about what is right and yet worth knowing."""

    kind: str
    is_fault: bool
    reason: str
