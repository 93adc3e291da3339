"""Text from outside is printed on one line, with nothing invisible in it."""

import pytest

from mmtrain.safe_text import one_line


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            ValueError("Validation error for field 'text_config':\n    TypeError: no\n"),
            "Validation error for field 'text_config': TypeError: no",
        ),
        (RuntimeError("\n\n  first \t second\r\nthird"), "first second third"),
        (ValueError(""), "ValueError"),
        (ValueError(" \n "), "ValueError"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (OSError("red \x1b[31m and \x07, left \u202e"), "red \\u{1b}[31m and \\u{7}, left \\u{202e}"),
    ],
)
def test_the_message_of_an_exception_is_put_on_one_line(error: BaseException, expected: str) -> None:
    assert one_line(error) == expected


def test_a_long_message_is_shortened() -> None:
    assert one_line(ValueError("ab" * 10), limit=20) == "ab" * 10
    assert one_line(ValueError("ab" * 10), limit=19) == "ab" * 9 + "…"
    assert len(one_line(ValueError("\x00" * 1000))) == 300
