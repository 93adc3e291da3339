"""Reads text files: those that a user names (configs, chat templates, lists of classes), and JSON of a model."""

import json
from pathlib import Path
from typing import Any

from mmtrain.errors import UserError
from mmtrain.regular_files import open_regular
from mmtrain.safe_text import one_line, shown

_MAX_BYTES = 4_000_000
NOT_UTF8 = "not UTF-8 text: save the file as UTF-8, such as with iconv -f UTF-16 -t UTF-8 or -f CP1252 or -f GB18030"


def read_text(path: Path, where: str, max_bytes: int = _MAX_BYTES) -> str:
    """The text of a file in UTF-8. Raises UserError, which begins with `where`, if it cannot be read."""
    try:
        with open_regular(path) as file:
            content = file.read(max_bytes + 1)
        if len(content) > max_bytes:
            raise UserError(f"{where}: larger than {max_bytes:,} bytes: name another file")
        return content.decode("utf-8")
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{where}: {NOT_UTF8}") from None


def json_object(path: Path, where: str | None = None) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError, which begins with `where`, by default the file's name, if there is
    none."""
    where = path.name if where is None else where
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON: {one_line(error)}") from None
    if not isinstance(found, dict):
        raise UserError(f"{where}: expected an object of keys, not {shown(found)}")
    return found
