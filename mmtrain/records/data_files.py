"""The files of records that a path in the config names.

In a folder nothing is skipped silently: a file that is neither read nor plainly something else is refused by name, and
so is a subfolder that has files of records. A glob reads only the files that it matches.
"""

import glob
import os
from pathlib import Path

from mmtrain.errors import UserError
from mmtrain.safe_text import visible

_READ = (".json", ".jsonl")
_OTHER = """
.jpg .jpeg .png .webp .gif .bmp .tif .tiff .ppm .pgm .pbm .pnm .avif .heic .svg .ico .pdf
.md .rst .txt .html .css .js .bib .tex .log .py .ipynb .sh .toml .cfg .ini .yaml .yml .jinja .lock
"""
_OTHER_THINGS = frozenset(_OTHER.split())
"""Endings of files that are plainly not records."""
_ABOUT = ("license", "licence", "readme", "notice", "copying", "citation", "changelog", "authors", "contributing")
"""Beginnings of the names of files about the data."""
_RECORDS = (
    *_READ,
    ".jsonlines",
    ".ndjson",
    ".parquet",
    ".arrow",
    ".csv",
    ".tsv",
    ".gz",
    ".zst",
    ".bz2",
    ".xz",
    ".zip",
    ".tar",
)


def find_data_files(path: str) -> list[Path]:
    """The .json and .jsonl files that `path` names: a file, a folder or a glob, in the order of their names.

    Raises UserError if there is none, or if one of them, or another file of the folder, is not read.
    """
    here = Path(path)
    if here.is_dir():
        found = _in_folder(here)
    elif here.exists():
        found = [here]
    else:
        found = sorted(Path(name) for name in glob.glob(path, recursive=True) if not Path(name).is_dir())
    if not found:
        tried = "" if here.is_absolute() else f" (looked for {visible(str(Path.cwd() / here))})"
        raise UserError(f"{visible(path)}: there is no .json or .jsonl file{tried}")
    wrong = [file for file in found if not _is_read(file)]
    if wrong:
        raise UserError([f"{visible(str(file))}: expected a .json or .jsonl file" for file in wrong])
    return found


def _is_read(file: Path) -> bool:
    return file.suffix.lower() in _READ


def _in_folder(folder: Path) -> list[Path]:
    found, faults = [], []
    for file in sorted(folder.iterdir()):
        if file.name.startswith("."):
            continue
        if file.is_dir():
            inner = _first_records(file)
            if inner is not None:
                faults.append(f"{visible(str(inner))}: in a subfolder of the data folder, which is not read")
        elif _is_read(file):
            found.append(file)
        elif file.suffix.lower() not in _OTHER_THINGS and not file.name.lower().startswith(_ABOUT):
            faults.append(f"{visible(str(file))}: only .json and .jsonl files are read")
    if faults:
        path = visible(str(folder))
        remedy = f"move it away, or name the files to read with a glob such as {path}/*.jsonl"
        raise UserError([f"{fault}: {remedy}" for fault in faults])
    return found


def _first_records(folder: Path) -> Path | None:
    """A file in `folder` or its subfolders that has the name of a file of records."""
    for inside, _, names in os.walk(folder):
        for name in sorted(names):
            if name.lower().endswith(_RECORDS) and not name.startswith("."):
                return Path(inside, name)
    return None
