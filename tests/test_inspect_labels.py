"""inspect-labels shows what is trained on: the same ids and flags, in the terminal, as JSON, with losses."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from mmtrain.cli import app
from mmtrain.config import dump_config
from mmtrain.config.schema import Config
from mmtrain.encoding.encode import Encoder
from mmtrain.encoding.load import load_processor
from mmtrain.errors import StorageError, UserError
from mmtrain.inspect_labels.command import inspect_labels
from mmtrain.inspect_labels.options import LabelsOptions
from mmtrain.inspect_labels.pixels import seen_pixels
from mmtrain.inspect_labels.terminal import print_sample
from mmtrain.inspect_labels.view import view_sample
from mmtrain.records.record_set import RecordSet
from mmtrain.safe_text import visible
from support.builders import write_jsonl
from support.fresh_samples import FreshSamples

MakeConfig = Callable[..., Config]


def samples_of(config: Config) -> Any:
    return FreshSamples(RecordSet(config.data.train), Encoder(load_processor(config.model.path)))


def test_tokens_and_labels_are_those_of_training(kind: str, make_config: MakeConfig) -> None:
    samples = samples_of(make_config(kind))
    for index in range(len(samples)):
        view, encoded = view_sample(samples, samples.encoder, index), samples.encoded(index)
        assert [token.id for token in view.tokens] == encoded.ids.tolist()
        labels = torch.where(torch.tensor(encoded.supervised), torch.tensor(encoded.ids, dtype=torch.long), -100)
        assert [token.label for token in view.tokens] == labels.tolist()
        assert [token.position for token in view.tokens] == list(range(len(encoded.ids)))


def test_spans_cover_every_token_once_and_have_the_text_of_their_turn(kind: str, make_config: MakeConfig) -> None:
    samples = samples_of(make_config(kind))
    for index in range(len(samples)):
        view = view_sample(samples, samples.encoder, index)
        assert [p for span in view.spans for p in range(span.start, span.end)] == list(range(len(view.tokens)))
        for turn, message in enumerate(view.conversation.messages):
            own = [span for span in view.spans if span.turn == turn and span.role == message.role]
            words = "".join(span.text for span in own if span.kind == "text")
            assert words.strip() == message.text.strip()
            assert all(span.supervised == (message.role == "assistant") for span in own)
        assert sum(span.kind == "image" for span in view.spans) == len(view.images) == len(view.conversation.images)
        for image in view.images:
            span = next(span for span in view.spans if span.start == image.start)
            assert span.kind == "image"
            assert span.end - span.start == image.tokens.num_placeholders


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("qwen2_5_vl", {"0.png": ((64, 64), (64, 64), (4, 4)), "1.png": ((96, 48), (96, 48), (6, 3))}),
        ("llava", {"0.png": ((64, 64), (28, 28), (4, 4)), "1.png": ((96, 48), (28, 28), (4, 4))}),
    ],
)
def test_sizes_and_grids_of_images(kind: str, sizes: dict[str, object], make_config: MakeConfig) -> None:
    samples = samples_of(make_config(kind))
    rows = [image for index in (0, 2) for image in view_sample(samples, samples.encoder, index).row()["images"]]
    found = {Path(row["path"]).name: (row["size"], row["used_size"], row["grid"]) for row in rows}
    assert found == sizes


def run(config: Config, tmp_path: Path, *words: str) -> tuple[int, str, str]:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    result = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1"}).invoke(app, ["inspect-labels", str(path), *words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_json_has_the_keys_that_are_promised(make_config: MakeConfig, tmp_path: Path) -> None:
    code, out, _ = run(make_config("qwen2_5_vl"), tmp_path, "--json", "--tokens", "--index", "2")
    assert code == 0
    (row,) = [json.loads(line) for line in out.splitlines()]
    promised = {"source", "line", "index", "shape", "num_tokens", "num_supervised", "images", "spans", "tokens"}
    assert row.keys() == promised
    assert (row["line"], row["index"]) == (3, 2)
    assert row["images"][0].keys() == {"path", "size", "used_size", "grid", "start", "num_placeholders"}
    assert row["spans"][0].keys() == {"role", "turn", "start", "end", "text", "supervised", "kind", "weight"}
    token = row["tokens"][0]
    assert token.keys() == {"position", "id", "text", "label", "role", "turn", "kind", "supervised"}
    assert {token["kind"] for token in row["tokens"]} == {"text", "special", "image"}
    supervised = "".join(token["text"] for token in row["tokens"] if token["supervised"])
    assert supervised == "red<|im_end|>It is a long, thin rectangle.<|im_end|>"
    assert row["num_supervised"] == sum(token["label"] != -100 for token in row["tokens"])


def test_the_terminal_shows_what_is_trained_on_without_colour_in_80_columns(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    code, out, _ = run(make_config("qwen2_5_vl"), tmp_path, "--index", "2", "--index", "3")
    assert code == 0
    assert "\x1b" not in out
    assert all(len(line) <= 80 for line in out.splitlines())
    assert "▌ assistant It is a long, thin rectangle.<|im_end|>" in out
    assert "▣ images/1.png  96×48 → 96×48  18 placeholders, 6×3" in out
    assert "<|image_pad|>" not in out
    supervised = [line for line in out.splitlines() if line.startswith("▌ assistant")]
    assert len(supervised) == 3
    assert any(line.startswith("▌") and "→ red (" in line for line in out.splitlines())
    assert any("<|im_end|>" in line and "(-100)" in line for line in out.splitlines())


def test_text_of_any_script_stays_on_its_line(make_config: MakeConfig, tmp_path: Path) -> None:
    words = "你好，世界 👩‍🚀 שלום עולם \x1b[31m\tend\n"
    rows = [{"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": words}]}]
    data = write_jsonl(tmp_path / "data" / "any.jsonl", rows)
    config = make_config("text")
    config = Config.model_validate(config.model_dump() | {"data": {"train": [{"path": str(data)}]}})
    samples, out = samples_of(config), io.StringIO()
    print_sample(view_sample(samples, samples.encoder, 0), Console(file=out, width=80, emoji=False))
    shown = out.getvalue()
    assert "\x1b" not in shown
    assert "\\u{1b}[31m⇥end⏎" in shown
    assert "你好，世界 👩‍🚀" in shown
    assert shown.count("\u2068") == shown.count("\u2069") > 0
    assert visible("a\nb") == "a⏎b"


def test_a_sample_that_is_refused_is_named_and_the_exit_code_is_1(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("text")
    with Path(config.data.train[0].path).open("a") as file:
        file.write('{"messages": [{"role": "user", "content": "x"}]}\n')
    code, out, err = run(config, tmp_path, "--index", "0", "--index", "8")
    assert code == 1
    assert "mixed.jsonl:1 · sample 0" in out.replace("\n", "")
    assert "mixed.jsonl:9: refused: there is no assistant turn to train on" in err


def test_an_index_out_of_range_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--index 8: there are 8 samples, 0 to 7"):
        inspect_labels(make_config("text"), LabelsOptions(indices=(8,)))


def test_a_page_that_cannot_be_written_is_refused_before_any_work(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("text")
    broken = Config.model_validate(config.model_dump() | {"model": {"path": "no/model"}})
    for path, words in ((tmp_path / "no" / "a.html", "there is no folder"), (tmp_path, "that is a folder")):
        with pytest.raises(UserError, match=words) as caught:
            inspect_labels(broken, LabelsOptions(html=path))
        assert caught.value.exit_code == 2
    with pytest.raises(StorageError, match=r"--html '/proc/a\.html': it cannot be written: "):
        inspect_labels(config, LabelsOptions(html=Path("/proc/a.html")))


RUN_EACH = """
import json, sys
from mmtrain.cli import main
for words in json.loads(sys.argv[1]):
    sys.argv = ["mmtrain", *words]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
    print(chr(0))
"""


@pytest.mark.slow("commands in a process of their own")
@pytest.mark.parametrize(
    ("encoding", "commands"), [("ascii", [["--json"], ["--html"], []]), ("utf-8", [["--all", "--json"], []])]
)
def test_a_file_name_that_is_not_utf_8_is_shown_everywhere(
    make_config: MakeConfig, tmp_path: Path, encoding: str, commands: list[list[str]]
) -> None:
    config = make_config("text")
    data = tmp_path / os.fsdecode(b"\xff\n.jsonl")
    data.write_bytes(Path(config.data.train[0].path).read_bytes())
    (tmp_path / "c.yaml").write_text(dump_config(config))
    page = str(tmp_path / os.fsdecode(b"\xfe\n.html"))
    same = ["inspect-labels", str(tmp_path / "c.yaml"), f"data.train.0.path={tmp_path}/*.jsonl"]
    words = [[*same, *own, *([page] if own == ["--html"] else [])] for own in commands]
    environment = {**os.environ, "PYTHONIOENCODING": f"{encoding}:strict"}
    done = subprocess.run([sys.executable, "-c", RUN_EACH, json.dumps(words)], capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    shown = done.stdout.decode(encoding).split("\0\n")
    assert len(shown) == len(commands) + 1
    for own, text in zip(commands, shown, strict=False):
        if "--json" in own:
            assert {json.loads(line)["source"] for line in text.splitlines()} == {str(data)}


def test_losses_equal_a_plain_forward(make_config: MakeConfig, tmp_path: Path) -> None:
    from mmtrain.inspect_labels.losses import token_losses

    config = make_config("text")
    samples = samples_of(config)
    found = token_losses(config, None, samples, samples.encoder.processor, [2, 6])
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    for index in (2, 6):
        ids = torch.tensor(samples.encoded(index).ids, dtype=torch.long)[None]
        nll = F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
        expected = {p: nll[p - 1].item() for p in range(1, ids.shape[1]) if samples.encoded(index).supervised[p]}
        assert found[index].keys() == expected.keys()
        assert all(found[index][p] == pytest.approx(expected[p], rel=1e-5) for p in expected)
    code, out, _ = run(config, tmp_path, "--index", "2", "--losses")
    assert code == 0
    assert f"mean {sum(found[2].values()) / len(found[2]):.3f} over" in out
    code, out, _ = run(config, tmp_path, "--index", "2", "--losses", "--json")
    assert json.loads(out)["losses"] == {str(p): pytest.approx(expected_loss) for p, expected_loss in found[2].items()}


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "llava"])
def test_the_pixels_shown_are_those_the_encoder_gets(kind: str, make_config: MakeConfig) -> None:
    samples = samples_of(make_config(kind))
    image = view_sample(samples, samples.encoder, 2).images[0]  # 96 x 48
    shown = np.asarray(seen_pixels(samples.encoder.processor)(image)).astype(float)
    original = PIL.Image.open(Path(samples.place(2).file).parent / image.found.name).convert("RGB")
    if kind == "llava":  # CLIP: the shorter edge to 28, then the middle
        original = original.resize((56, 28), PIL.Image.Resampling.BICUBIC).crop((14, 0, 42, 28))
    assert shown.shape[:2][::-1] == image.tokens.used_size
    assert np.abs(shown - np.asarray(original).astype(float)).mean() < 2
