"""Data sets of the Hugging Face hub that are in a local cache already: as `hf download` or as `datasets` keeps them."""

import re
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError

from mmtrain.errors import UserError
from mmtrain.safe_text import shown, visible

PREFIX = "hub:"
_NAME = re.compile(r"([\w.-]+/[\w.-]+)((?:/[^/\\]+)*)")


def hub_folder(path: str) -> Path:
    """The folder in a local cache that `path`, `hub:owner/name` or `hub:owner/name/folder`, names.

    Raises UserError if it is in none, or if `datasets` keeps several versions of it.
    """
    match = _NAME.fullmatch(path.removeprefix(PREFIX))
    if match is None or ".." in match[2].split("/"):
        raise UserError(f"{visible(path)}: expected hub:owner/name, or hub:owner/name/folder for one of its folders")
    name, folder = match[1], match[2].removeprefix("/")
    try:
        found = Path(snapshot_download(name, repo_type="dataset", local_files_only=True))
    except (HFValidationError, OSError, ValueError):
        found = _prepared(path, name)
    if not (found / folder).is_dir():
        raise UserError(f"{visible(path)}: its cached copy has no folder {shown(folder)}")
    return found / folder


def _prepared(path: str, name: str) -> Path:
    """The folder of Arrow files that `datasets` made of it."""
    kept = Path(constants.HF_HOME) / "datasets" / name.replace("/", "___")
    versions = sorted({file.parent for file in kept.rglob("*.arrow")}) if kept.is_dir() else []
    if len(versions) > 1:
        names = ", ".join(visible(str(version)) for version in versions[:3])
        raise UserError(f"{visible(path)}: `datasets` keeps several versions of it: name one of {names} as the path")
    if not versions:
        raise UserError(
            f"{visible(path)}: not in the local hub cache, and nothing is downloaded here: run "
            f"`hf download --repo-type dataset {visible(name)}`"
        )
    return versions[0]
