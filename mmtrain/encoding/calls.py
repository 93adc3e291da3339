"""Where the calls of a reply are in the text that a chat template makes.

What a template makes of a call is not known beforehand: JSON, tags, a token before it. It is all that the template
writes between the text of the reply, or the end of inference's prompt, and the token that ends the reply.
"""

import re
from collections.abc import Sequence

from mmtrain.encoding.tokenizer import Tokenizer
from mmtrain.records.chat import SampleError, ToolCall
from mmtrain.safe_text import shown


def shared_reply(whole: str, closing: str, at: int) -> str:
    """A reply with its end as it is in `whole` from `at` on, where inference's prompt ends: the longest end of
    `closing`, the text up to and with the reply, that `whole` has there.

    A template may write more before a last reply, such as an empty thought, than before one that others follow.
    """
    starts = range(at, len(closing))
    return next((closing[start:] for start in starts if whole.startswith(closing[start:], at)), "")


def length_without_end(reply: str, tokenizer: Tokenizer) -> int:
    """The characters of `reply` before the token that ends it, or before white space if it has none.

    Of several special tokens one after the other, the end is the first that stops generation, or else the last.
    """
    text = reply.rstrip()
    run: list[re.Match[str]] = []
    for match in reversed(list(tokenizer.traits.special_tokens.finditer(text))):
        if match.end() != (run[-1].start() if run else len(text)):
            break
        run.append(match)
    stops = [match for match in run if tokenizer.id_of(match.group()) in tokenizer.traits.eos_ids]
    return next((match.start() for match in (*reversed(stops), *run)), len(text))


def shows_all(text: str, calls: Sequence[ToolCall]) -> bool:
    """Whether every call is in `text`, by its name."""
    names = [call.name for call in calls]
    return all(text.count(name) >= names.count(name) for name in names)


def check_plain(texts: Sequence[str], tokenizer: Tokenizer) -> None:
    """Raises SampleError where a special token is in a tool or a call: the model would take it for its own."""
    for text in texts:
        if match := tokenizer.traits.special_tokens.search(text):
            raise SampleError(f"{shown(match.group())} in a tool or a call is a special token of the model: remove it")
