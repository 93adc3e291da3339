"""Every shape and container of records through training, inspect-labels and evaluation.

The table of docs/data.md, printed or written: `PYTHONPATH=.:tests python -m support.data_table [--write]`.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import PIL.Image

from mmtrain.config.schema import Config
from mmtrain.encoding.encode import Encoded
from mmtrain.encoding.load import load_processor
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.inspect_labels.chosen import look_at
from mmtrain.progress import QUIET
from mmtrain.records.chat import Conversation, Image, Message
from mmtrain.scoring.eval_samples import EvalSamples
from mmtrain.train.dataset import Dataset
from support.builders import ROOT
from support.label_models import NUM_PLACEHOLDERS, make_directory
from test_containers import CONTAINERS, EXPECTED
from test_shapes import SHAPES
from test_tools import SHAPES as TOOL_SHAPES

PAGE = ROOT / "docs" / "data.md"
BEGIN, END = "<!-- records: begin -->\n", "<!-- records: end -->\n"
HEAD = "| record or file | first conversation | train | inspect-labels | eval |\n|---|---|---|---|---|\n"
COMMANDS = ("train", "inspect-labels", "eval")

TEMPLATE = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Case:
    name: str
    path: Path
    index: int
    """Of the sample among those of all cases."""
    expected: Conversation
    """Written by hand."""

    @property
    def text(self) -> str:
        """What `TEMPLATE` makes of the expected conversation, without the template."""
        tools = ", ".join(self.expected.tools)
        return (f"<tools>[{tools}]</tools>\n" if tools else "") + "".join(
            f"<|im_start|>{message.role}\n{words(message)}<|im_end|>\n" for message in self.expected.messages
        )

    @property
    def replies(self) -> list[str]:
        """What is trained on."""
        return [
            f"{words(message)}<|im_end|>"
            for message in self.expected.messages
            if message.role == "assistant" and message.train
        ]


def words(message: Message) -> str:
    """The turn as `TEMPLATE` writes it."""
    parts = "".join("<image>" if isinstance(part, Image) else part.text for part in message.parts)
    calls = "".join(
        f"<call>{json.dumps({'name': call.name, 'arguments': json.loads(call.arguments)}, ensure_ascii=False)}</call>"
        for call in message.calls
    )
    return (f"<think>{message.reasoning}</think>" if message.reasoning else "") + parts + calls


def cases(folder: Path) -> list[Case]:
    """Every shape in a file of its own, then every container, and the images that they name."""
    for name in ("a", "b", *map(str, range(5))):
        PIL.Image.new("RGB", (28, 28), "red").save(folder / f"{name}.png")
    shapes: dict[str, tuple[Any, Conversation]] = {name: (record, made) for name, (_, record, made) in SHAPES.items()}
    found = []
    for number, (name, (record, made)) in enumerate({**shapes, **TOOL_SHAPES}.items()):
        path = folder / f"{number}.jsonl"
        path.write_text(json.dumps(record).replace("file:///x/a.png", "a.png") + "\n", encoding="utf-8")
        found.append(Case(name, path, number, made))
    start = len(found)
    containers = {name: make for name, (make, _) in CONTAINERS.items() if not name.endswith(".zst")}  # needs a library
    for number, (name, make) in enumerate(containers.items()):
        (folder / str(number)).mkdir()
        path = folder / str(number) / name
        path.write_bytes(make())
        found.append(Case(f"`{name}`", path, start + len(EXPECTED) * number, EXPECTED[0]))
    return found


def results(folder: Path) -> dict[str, tuple[Case, tuple[bool, bool, bool]]]:
    """For each case whether each command reads the very conversation that was written by hand."""
    every = cases(folder)
    make_directory(folder / "model", "byte_level", TEMPLATE, vision=True)
    sources = [{"path": str(case.path), "root": str(folder)} for case in every]
    config = Config.model_validate(
        {
            "model": {"path": str(folder / "model")},
            "data": {"train": sources, "eval": [{**one, "name": str(i)} for i, one in enumerate(sources)]},
            "run": {"output_dir": str(folder / "run")},
        }
    )
    processor = load_processor(config.model.path)
    trained = Dataset(config, processor, QUIET).train
    evaluated = EvalSamples.of(config, config.data.eval, processor, QUIET).samples
    shown = look_at(config, "train", lambda number, indices: [case.index for case in every]).views
    found = {}
    for case, view in zip(every, shown, strict=True):
        spans = [(span.text, span.supervised) for span in view.spans]
        texts = "".join(text for text, _ in spans).replace("<image>" * NUM_PLACEHOLDERS, "<image>")
        is_shown = texts == case.text and _joined(spans) == case.replies
        of_commands = (is_read(trained.encoded(case.index), case, processor), is_shown)
        found[case.name] = (case, (*of_commands, is_read(evaluated.encoded(case.index), case, processor)))
    return found


def is_read(encoded: Encoded, case: Case, processor: ChatProcessor) -> bool:
    decode = processor.tokenizer.decode
    text = decode(encoded.ids.tolist()).replace("<image>" * NUM_PLACEHOLDERS, "<image>")
    spans = [(decode([id_]), on) for id_, on in zip(encoded.ids.tolist(), encoded.supervised.tolist(), strict=True)]
    return text == case.text and _joined(spans) == case.replies


def _joined(spans: list[tuple[str, bool]]) -> list[str]:
    """The texts of the runs of supervised tokens."""
    runs: list[str] = []
    before = False
    for text, supervised in spans:
        if supervised:
            runs[len(runs) - before :] = [(runs[-1] if before else "") + text]
        before = supervised
    return runs


def rows(found: dict[str, tuple[Case, tuple[bool, bool, bool]]]) -> Iterator[str]:
    for name, (case, of_commands) in found.items():
        turns = [f"{message.role}: {_plain(message)}" for message in case.expected.messages]
        yield f"| {name} | {' · '.join(turns)} | {' | '.join('yes' if one else 'no' for one in of_commands)} |\n"


def _plain(message: Message) -> str:
    text = words(replace(message, parts=tuple(p for p in message.parts))).replace("\n", " ⏎ ").replace("|", "\\|")
    return f"`{text}`"


def table(page: Path = PAGE) -> str:
    return page.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


def main() -> None:
    with TemporaryDirectory() as folder:
        made = HEAD + "".join(rows(results(Path(folder))))
    if "--write" not in sys.argv:
        print(made, end="")
        return
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + made + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
