"""Opens the files of records that a path names."""

from collections.abc import Callable
from pathlib import Path

from mmtrain.errors import UserError
from mmtrain.records.data_files import find_data_files
from mmtrain.records.sources.arrow import ArrowFile, ParquetFile
from mmtrain.records.sources.compressed import plain_suffix
from mmtrain.records.sources.delimited import DelimitedFile
from mmtrain.records.sources.json_lines import JsonlFile, has_json_lines, is_json_list
from mmtrain.records.sources.json_list import JsonFile
from mmtrain.records.sources.place import RecordFile
from mmtrain.records.sources.tar import TarFile
from mmtrain.regular_files import open_regular
from mmtrain.safe_text import visible


def _json(path: Path) -> RecordFile:
    return JsonlFile(path) if has_json_lines(path) else JsonFile(path)


def _json_lines(path: Path) -> RecordFile:
    return JsonFile(path) if is_json_list(path) else JsonlFile(path)


_LFS = b"version https://git-lfs"
"""The beginning of what Git has in the place of a file that is stored elsewhere."""
_KINDS: dict[str, Callable[[Path], RecordFile]] = {
    ".json": _json,
    ".jsonl": _json_lines,
    ".jsonlines": _json_lines,
    ".ndjson": _json_lines,
    ".csv": lambda path: DelimitedFile(path, ","),
    ".tsv": lambda path: DelimitedFile(path, "\t"),
    ".parquet": ParquetFile,
    ".arrow": ArrowFile,
    ".tar": TarFile,
}
"""How a file is opened, by its ending without that of a compression."""


def open_records(path: str, split: str | None = None) -> list[RecordFile]:
    """The record files that `path` names, of `split` if it is given, in the order of their names.

    Raises UserError if there is none, if one cannot be read, or if a file of the folder would be left out.
    """
    files = [open_file(file) for file in find_data_files(path, split)]
    if not any(len(file) for file in files):
        raise UserError(f"{visible(path)}: there are no records in it")
    return files


def open_file(path: Path) -> RecordFile:
    """The records of one file. Raises UserError if it cannot be read."""
    try:
        with open_regular(path) as file:
            if file.read(len(_LFS)) == _LFS:
                raise UserError(
                    f"{visible(str(path))}: Git LFS has not fetched it yet: run `git lfs pull` in its folder"
                )
        return _KINDS[plain_suffix(path)](path)
    except OSError as error:
        raise UserError(f"{visible(str(path))}: cannot be read: {error.strerror}") from None
