"""The table of docs/models.md, printed or written: `PYTHONPATH=.:tests python -m support.family_table [--write]`."""

import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from support.builders import ROOT
from support.family_proof import Proof, prove
from support.family_reference import FAMILIES, conversations, save_images
from support.real_models import real_column

PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- families: begin -->\n", "<!-- families: end -->\n"
COLUMNS = ("family", "ids", "published files", "LoRA and full step", "adapter", "bfloat16", "rows")
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"
_REASONS = {
    "one sample at a time": "one sample at a time",
    "differ by": "padded: packed samples change each other",
    "cannot run packed rows": "padded: it takes no packed rows",
}


def row(name: str, proof: Proof) -> str:
    """The line of a family that was proven."""
    own = [line for line in proof.lines if line.startswith("packing: off")]
    rows = "packed" if proof.packed else next(text for part, text in _REASONS.items() if part in own[0])
    alone = ["every case"] if set(proof.alone) == conversations(name).keys() else proof.alone
    ids = "; ".join(["own", *_cases("alone", alone), *_cases("refused", proof.refused)])
    marks = "failed | failed | failed" if proof.failures else "exact | exact | within 5e-3"
    return f"| {label(name)} | {ids} | {real_column(name)} | {marks} | {rows} |\n"


def _cases(what: str, found: Collection[str]) -> Iterator[str]:
    if found:
        yield f"{what}: {', '.join(dict.fromkeys(found)).replace('_', ' ')}"


def label(name: str) -> str:
    needs = FAMILIES[name].needs
    return f"`{name}`" + (f" (needs {' and '.join(needs.split())})" if needs else "")


def table(page: Path = PAGE) -> dict[str, str]:
    """The lines of the page by family."""
    lines = page.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].splitlines(keepends=True)
    return {line.split("`")[1]: line for line in lines if line.startswith("| `")}


def _rows() -> Iterator[str]:
    with TemporaryDirectory() as folder:
        root = save_images(Path(folder))
        for name in FAMILIES:
            own = Path(folder) / name
            own.mkdir()
            yield row(name, prove(name, root, own))


def main() -> None:
    made = HEAD + "".join(_rows())
    if "--write" not in sys.argv:
        print(made, end="")
        return
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + made + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
