"""The audit counts what is there, names the place of every fault and does not depend on the number of workers.

Counts are computed by hand from the records, or by transformers' tokenizer alone.
"""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from rich.console import Console
from transformers import AutoTokenizer

from mmtrain.checks import findings
from mmtrain.config.schema import Config
from mmtrain.dataset import encode_all, store
from mmtrain.encoding import encode, load
from mmtrain.errors import UserError
from mmtrain.inspect_labels import audit as room
from mmtrain.inspect_labels.audit import audit
from mmtrain.inspect_labels.audit_report import AuditReport
from support.builders import TINY, mixed_rows, write_jsonl

Row = dict[str, Any]


def ask(question: str, answer: str, *images: str) -> Row:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": list(images)}


def config_for(*files: Path, model: Path = TINY, **data: Any) -> Config:
    sources = [{"path": str(file)} for file in files]
    return Config.model_validate(
        {"model": {"path": str(model)}, "data": {"train": sources, **data}, "run": {"output_dir": "runs/none"}}
    )


def printed(report: AuditReport) -> str:
    out = io.StringIO()
    report.print(Console(file=out, width=80, markup=False, highlight=False, emoji=False))
    return out.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """a.png and its copy b.png, c.png of the same size and other pixels, and d.png, wider."""
    for name, size, colour in (("a", (60, 60), "red"), ("c", (60, 60), "blue"), ("d", (210, 90), "red")):
        PIL.Image.new("RGB", size, colour).save(tmp_path / f"{name}.png", compress_level=0)
    shutil.copyfile(tmp_path / "a.png", tmp_path / "b.png")
    return tmp_path


def own_length(text: str) -> int:
    """Tokens of a text whose placeholders are put in by hand."""
    return len(AutoTokenizer.from_pretrained(TINY)(text, add_special_tokens=False)["input_ids"])


def chat(question: str, answer: str) -> str:
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    user = f"<|im_start|>user\n{question}<|im_end|>\n"
    return f"{system}{user}<|im_start|>assistant\n{answer}<|im_end|>\n"


def image(num_placeholders: int) -> str:
    return f"<|vision_start|>{'<|image_pad|>' * num_placeholders}<|vision_end|>"


def test_the_audit_counts_samples_tokens_and_images(images: Path) -> None:
    one = write_jsonl(images / "one.jsonl", [ask("what?", "red"), ask("<image>what?", "a circle", "a.png")])
    two = write_jsonl(images / "two.jsonl", [ask("<image>so?", "blue", "d.png"), ask("why?", "because" * 30)])
    report = audit(config_for(one, two))
    # a placeholder covers 16 x 16 pixels: 60x60 is used as 64x64, 4 x 4 of them, 210x90 as 208x96, 13 x 6
    lengths = [
        own_length(chat("what?", "red")),
        own_length(chat(f"{image(16)}what?", "a circle")),
        own_length(chat(f"{image(78)}so?", "blue")),
        own_length(chat("why?", "because" * 30)),
    ]
    supervised = [own_length(f"{answer}<|im_end|>") for answer in ("red", "a circle", "blue", "because" * 30)]
    row = report.row()
    assert (row["num_samples"], row["num_images"], row["num_refused"], row["num_faults"]) == (4, 2, 0, 0)
    assert (row["num_tokens"], row["num_supervised"]) == (sum(lengths), sum(supervised))
    assert row["supervised_share"] == sum(supervised) / sum(lengths)
    assert [source["num_tokens"] for source in row["sources"]] == [sum(lengths[:2]), sum(lengths[2:])]
    assert [source["num_images"] for source in row["sources"]] == [1, 1]
    assert [source["path"] for source in row["sources"]] == [str(one), str(two)]
    places = [f"{one}:1", f"{one}:2", f"{two}:1", f"{two}:2"]
    longest = sorted(zip(lengths, places, strict=True), reverse=True)
    assert [(item["num_tokens"], item["place"]) for item in row["longest"]] == longest
    assert row["image_histogram"] == [
        {"from": 32, "to": 63, "count": 1},
        {"from": 64, "to": 127, "count": 0},
        {"from": 128, "to": 255, "count": 1},
    ]
    bins = {(item["from"], item["to"]): item["count"] for item in row["length_histogram"]}
    assert bins == {(first, last): sum(first <= n <= last for n in lengths) for first, last in bins}
    assert sum(bins.values()) == 4
    assert json.loads(json.dumps(row)) == row


def test_duplicates_have_the_same_tokens_and_the_same_images(images: Path) -> None:
    rows = [
        ask("what?", "red"),
        ask("<image>what?", "red", "a.png"),
        ask("<image>what?", "red", "b.png"),  # another name, the same bytes
        ask("<image>what?", "red", "c.png"),  # as large, and another image
        ask("what?", "red"),
        ask("what?", "red "),
        ask("what?", "red"),
    ]
    assert (images / "a.png").stat().st_size == (images / "c.png").stat().st_size
    path = write_jsonl(images / "rows.jsonl", rows)
    report = audit(config_for(path))
    assert report.num_duplicates == 3
    assert report.duplicates == [[f"{path}:1", f"{path}:5", f"{path}:7"], [f"{path}:2", f"{path}:3"]]
    assert "3 samples the same as an earlier one" in printed(report)


@pytest.fixture
def bad(images: Path) -> Path:
    """Good samples at lines 1 and 5, and between them what is refused, broken and too long."""
    whole = (images / "d.png").read_bytes()
    at = whole.index(b"IDAT") + 4
    (images / "broken.png").write_bytes(whole[:at] + bytes(20) + whole[at + 20 :])  # header and end are there
    lines = [
        json.dumps(ask("what?", "red")),
        "{not json",
        json.dumps(ask("<image>what?", "red", "missing.png")),
        json.dumps(ask("<image>what?", "red", "broken.png")),
        json.dumps(ask("so?", "blue")),
        json.dumps(ask("why?", "because " * 500)),
        json.dumps({"messages": [{"role": "user", "content": "what?"}]}),
    ]
    path = images / "bad.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def places(report: AuditReport) -> dict[str, list[str]]:
    return {kind: [place for place, _ in found] for kind, found in report.faults.items()}


def test_faults_name_their_place(bad: Path) -> None:
    report = audit(config_for(bad, max_length=400))
    assert places(report) == {
        findings.REFUSED: [f"{bad}:2", f"{bad}:3", f"{bad}:7"],
        findings.UNDECODABLE: [f"{bad}:4"],
        room.TOO_LONG: [f"{bad}:6"],
    }
    assert report.num_faults == 5
    assert (report.sources[0].num_samples, report.sources[0].num_refused) == (7, 3)
    text = printed(report)
    assert f"{bad}:3: the image 'missing.png'" in text
    assert "5 faults" in text
    refused = [item["reason"] for item in report.row()["faults"][findings.REFUSED]]
    assert "not JSON" in refused[0]
    assert "no assistant turn" in refused[2]


def test_images_are_not_decoded_where_the_config_says_so(bad: Path) -> None:
    assert findings.UNDECODABLE not in audit(config_for(bad, decode_images=False)).faults


def test_too_long_is_a_note_where_the_config_drops_it(bad: Path) -> None:
    report = audit(config_for(bad, max_length=400, too_long="drop"))
    assert room.TOO_LONG not in report.faults
    assert report.notes[room.TOO_LONG] == 1
    assert report.first_notes[room.TOO_LONG][0] == f"{bad}:6"


def test_the_model_limits_the_length_too(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    """The model was made for 2,048 positions."""
    path = write_jsonl(tmp_path / "long.jsonl", [ask("why?", "because " * 2100), ask("what?", "red")])
    report = audit(config_for(path, model=model_dirs["text"], max_length=10**6))
    assert places(report) == {room.TOO_LONG: [f"{path}:1"]}
    ((_, reason),) = report.faults[room.TOO_LONG]
    assert "over the 2,048 allowed (the model's positions, max_position_embeddings in its config.json)" in reason


def test_a_fault_of_the_encoder_is_found(
    make_config: Callable[..., Config], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encoder that forgets the last supervised token of every sample: eight samples, eight ends."""
    assemble = encode.Encoder._assemble

    def forgetful(self: Any, *args: Any) -> Any:
        encoded, placed = assemble(self, *args)
        encoded.supervised[encoded.supervised.nonzero()[0][-1]] = False
        return encoded, placed

    config = make_config(kind)
    assert audit(config).num_faults == 0
    monkeypatch.setattr(encode.Encoder, "_assemble", forgetful)
    monkeypatch.setattr(load, "try_family", lambda processor: None)
    monkeypatch.setattr(store, "_VERSION", "another encoder")
    file = config.data.train[0].path
    assert places(audit(config)) == {findings.NO_END: [f"{file}:{line}" for line in range(1, 9)]}


@pytest.mark.slow("encodes in several worker processes")
def test_the_number_of_workers_changes_nothing(bad: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = write_jsonl(bad.parent / "mixed.jsonl", mixed_rows(bad.parent, with_images=True) * 3)
    config = config_for(good, bad, max_length=400)
    reports, rows = [], []
    monkeypatch.setattr(encode_all, "_CHUNK", 2)  # 31 samples: sixteen chunks, more than wait at a time
    monkeypatch.setattr(encode_all, "num_cores", lambda: 2)
    for many in (10**6, 1):
        monkeypatch.setattr(encode_all, "_MANY", many)
        got: list[Row] = []
        report = audit(config, on_row=got.append, with_tokens=True)
        reports.append((report.row(), printed(report)))
        rows.append(got)
    assert reports[0] == reports[1]
    assert rows[0] == rows[1]
    assert [row["index"] for row in rows[0]] == list(range(31))
    assert [row["line"] for row in rows[0] if "refused" in row] == [2, 3, 7]
    assert all(len(row["tokens"]) == row["num_tokens"] for row in rows[0] if "refused" not in row)
    assert {"source", "line", "index", "refused"} == rows[0][25].keys()


def test_the_evaluation_split_is_audited_too(images: Path) -> None:
    path = write_jsonl(images / "one.jsonl", [ask("what?", "red"), ask("so?", "blue")])
    with pytest.raises(UserError, match=r"data\.eval"):
        audit(config_for(path), "eval")
    other = write_jsonl(images / "two.jsonl", [ask("why?", "because")])
    report = audit(config_for(path, eval=[{"path": str(other)}]), "eval")
    assert [(source.path, source.num_samples) for source in report.sources] == [(str(other), 1)]


def test_the_report_fits_80_columns_and_shows_names_as_they_are(tmp_path: Path) -> None:
    name = "[bold]a_rather_long_name_of_a_file_with_many_samples.jsonl"
    files = [write_jsonl(tmp_path / folder / name, [ask("what?", f"red {folder}")] * 2) for folder in ("x", "y")]
    report = audit(config_for(*files))
    table = printed(report).split("\nTokens of a sample")[0]
    assert max(map(len, table.splitlines())) <= 80
    assert "[bold]a_rather" in table
    assert "\\[" not in table
    assert "\x1b" not in table
    assert [line.split()[:2] for line in table.splitlines() if line.startswith("all")] == [["all", "4"]]
