"""Text for one line: that from outside (file names, values, text of samples) made safe to print, and counts."""

import unicodedata

_SIGNS = {"\n": "⏎", "\t": "⇥", "\r": "␍"}
_ISOLATE, _END_ISOLATE = "\u2068", "\u2069"


def shown(text: object, limit: int = 80) -> str:
    """`text` (a file name, a value) in quotes, on one line, control characters escaped, at most `limit` characters."""
    return repr(shortened(str(text), limit))


def path_end(path: str, limit: int) -> str:
    """At most `limit` characters of `path`, without its beginning: its end tells files apart."""
    return path if len(path) <= limit else "…" + path[len(path) - limit + 1 :]


def shortened(text: str, limit: int) -> str:
    """At most `limit` characters of `text`, an ellipsis in the place of the rest."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def counted(number: int, noun: str) -> str:
    """`1 image` or `1,200 images`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def one_line(error: BaseException, limit: int = 300) -> str:
    """The message of an exception on one line: its lines joined, control characters escaped, at most `limit`
    characters. The name of its class if it has no message.

    All lines are used, because the first line of a message can end with a colon and explain nothing.
    """
    words = " ".join(str(error).split()) or type(error).__name__
    plain = "".join(char if _printable(char) else f"\\u{{{ord(char):x}}}" for char in words)
    return shortened(plain, limit)


def error_line(error: BaseException) -> str:
    """`one_line` after the name of the exception's class, for errors of libraries, which can be as short as a key."""
    message, name = one_line(error), type(error).__name__
    return message if message == name else f"{name}: {message}"


def visible(text: str) -> str:
    """`text` on one line, with visible white space and control characters. Right-to-left text is isolated."""
    plain = "".join(_SIGNS.get(char) or (char if _printable(char) else f"\\u{{{ord(char):x}}}") for char in text)
    is_rtl = any(unicodedata.bidirectional(char) in ("R", "AL") for char in plain)
    return f"{_ISOLATE}{plain}{_END_ISOLATE}" if is_rtl else plain


def _printable(char: str) -> bool:
    return char.isprintable() or char == "\u200d"  # the joiner inside emoji
