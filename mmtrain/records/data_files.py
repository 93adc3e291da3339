"""The files of records that a path in the config names.

A folder is read with its subfolders. Nothing in it is skipped silently: a file that is neither read nor plainly
something else is refused by name. A glob reads only the files that it matches.
"""

import glob
import json
import re
from pathlib import Path

from mmtrain.errors import UserError
from mmtrain.records.hub import PREFIX, hub_folder
from mmtrain.safe_text import shown, visible

_TEXTS = (".json", ".jsonl", ".jsonlines", ".ndjson", ".csv", ".tsv")
READ = (*_TEXTS, *(text + packed for text in _TEXTS for packed in (".gz", ".zst")), ".parquet", ".arrow", ".tar")
"""Endings of the files that are read."""
_STATE, _SPLITS = "state.json", "dataset_dict.json"
"""What Hugging Face's `save_to_disk` writes into the folder of a data set, and of several splits."""
_INFOS = ("dataset_info.json", "dataset_infos.json")
"""What Hugging Face's tools write about a data set."""
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "test": ("test", "testing", "eval", "evaluation"),
    "validation": ("validation", "valid", "dev", "val"),
}
"""The words in the names of files and folders that say to which split they belong, as in the library `datasets`."""
_OTHER = """
.jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .ppm .pgm .pbm .pnm .mpo .avif .heic .heif .dng .svg .ico .pdf
.mp4 .mov .aae .xmp
.md .rst .txt .html .css .js .bib .tex .log .py .ipynb .sh .toml .cfg .ini .yaml .yml .jinja .lock
"""
_OTHER_THINGS = frozenset(_OTHER.split())
"""Endings of files that are plainly not records."""
_ABOUT = ("license", "licence", "readme", "notice", "copying", "citation", "changelog", "authors", "contributing")
"""Beginnings of the names of files about the data."""
_REMEDIES = {
    **dict.fromkeys((".xlsx", ".xls", ".ods"), "save the table as CSV in UTF-8"),
    ".zip": "unpack it; images can stay in it, see `root`",
    **dict.fromkeys((".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar"), "unpack it"),
    ".txt": "name it .csv or .tsv if it is a table",
    ".pq": "name it .parquet",
    **dict.fromkeys((".jpg", ".jpeg", ".png", ".webp"), "docs/data.md says how to write one for images"),
    **dict.fromkeys((".feather", ".ipc"), "name it .arrow"),
}
"""By the ending of a file that is not read, what to do."""
_JUNK = ("thumbs.db", "desktop.ini", "__macosx")
"""What file managers leave in folders."""
_EXPECTED = "expected .json, .jsonl, .csv, .tsv (or one of them with .gz, .zst), .parquet, .arrow or .tar"


def find_data_files(path: str, split: str | None = None) -> list[Path]:
    """The files of records that `path` (a file, folder, glob or `hub:owner/name`) names, in the order of their names.

    `split`: only those whose names below `path` say that they are of it. Raises UserError if there is none, or if one
    of them, or another file of the folder, is not read.
    """
    here = hub_folder(path) if path.startswith(PREFIX) else Path(path)
    if here.is_dir():
        found = _in_folder(here, split)
    elif here.exists():
        found = [here]
    else:
        found = sorted(Path(name) for name in glob.glob(path, recursive=True) if not Path(name).is_dir())
    if not found:
        tried = "" if here.is_absolute() else f" (looked for {visible(str(Path.cwd() / here))})"
        images = here.is_dir() and any(file.suffix.lower() in (".jpg", ".png") for file in here.rglob("*"))
        hint = "; docs/data.md says how to write one for images" if images else ""
        raise UserError(f"{visible(path)}: there is no file of records{tried}: {_EXPECTED}{hint}")
    wrong = [file for file in found if not _is_read(file) or file.name in _INFOS]
    if wrong:
        raise UserError([f"{visible(str(file))}: not a file of records: {_remedy(file)}" for file in wrong])
    if split is not None:
        return _of_split(found, here, split)
    several = sorted({name for file in found for name in _splits(file, here)})
    if path.startswith(PREFIX) and len(several) > 1:
        raise UserError(
            f"{visible(path)}: it has the splits {', '.join(map(shown, several))}: set `split` to one of them"
        )
    return found


def _remedy(file: Path) -> str:
    if file.name in _INFOS:
        return "it describes data sets: give a file of records that it names"
    return _REMEDIES.get(file.suffix.lower(), _EXPECTED)


def _of_split(files: list[Path], here: Path, split: str) -> list[Path]:
    found = [file for file in files if split in _splits(file, here)]
    if not found:
        known = sorted({name for file in files for name in _splits(file, here)})
        names = ", ".join(map(shown, known)) if known else "no splits"
        raise UserError(f"{visible(str(here))}: no file of the split {shown(split)}: the names say {names}")
    return found


def _splits(file: Path, here: Path) -> set[str]:
    """The splits that the name of `file` below `here` says, by one of the usual words or its folder's name."""
    below = file.relative_to(here) if file.is_relative_to(here) else Path(file.name)
    words = {word for part in below.parts for word in re.split(r"[-_./ 0-9]+", part.lower())}
    usual = {name for name, spellings in _SPLIT_NAMES.items() if words & set(spellings)}
    return usual | {part for part in below.parent.parts if not usual}


def _is_read(file: Path) -> bool:
    return file.name.lower().endswith(READ)


def _in_folder(folder: Path, split: str | None) -> list[Path]:
    found: list[Path] = []
    faults: list[str] = []
    _collect(folder, found, faults, split)
    if faults:
        path = visible(str(folder))
        remedy = f"move it away, or name the files to read with a glob such as {path}/*.jsonl"
        raise UserError([f"{fault}: {remedy}" for fault in faults])
    return found


def _collect(folder: Path, found: list[Path], faults: list[str], split: str | None) -> None:
    """Add the files of records in `folder` and its subfolders to `found`, and what would be left out to `faults`."""
    if (folder / _STATE).is_file():
        found += _saved_to_disk(folder)
        return
    if (folder / _SPLITS).is_file():
        if split is None:
            raise UserError(f"{visible(str(folder))}: it has several splits: set `split`, or name the folder of one")
        for each in sorted(folder.iterdir()):
            if (each / _STATE).is_file():
                found += _saved_to_disk(each)
        return
    for file in sorted(folder.iterdir()):
        if file.name.startswith(".") or file.name in _INFOS or file.name.lower() in _JUNK:
            continue
        if file.is_dir():
            if not file.is_symlink():  # a link may lead back
                _collect(file, found, faults, split)
            elif any(map(_is_read, file.rglob("*"))):
                faults.append(f"{visible(str(file))}: a link to a folder with files of records, which is not followed")
        elif _is_read(file):
            found.append(file)
        elif file.suffix.lower() not in _OTHER_THINGS and not file.name.lower().startswith(_ABOUT):
            faults.append(f"{visible(str(file))}: not a file of records that is read")


def _saved_to_disk(folder: Path) -> list[Path]:
    """The files of a Hugging Face data set, in their order. Raises UserError if its state is broken."""
    where = visible(str(folder / _STATE))
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        names = [str(file["filename"]) for file in state["_data_files"]]
        selects = bool(state.get("_indices_files") or state.get("_indices_data_files"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{where}: not the state of a data set that `save_to_disk` wrote") from None
    if selects:
        raise UserError(
            f"{where}: the data set selects rows by a list of indices: call flatten_indices() and save it again"
        )
    if wrong := [name for name in names if "/" in name or not name.endswith(".arrow")]:
        raise UserError(f"{where}: {wrong[0]!r} is not an .arrow file of the folder")
    return [folder / name for name in names]
