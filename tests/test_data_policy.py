"""Samples with faults under a policy: nothing is lost silently; and commands on records of other containers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from typer.testing import CliRunner

from mmtrain.cli import app
from mmtrain.config.data_section import EvalSource
from mmtrain.config.schema import Config
from mmtrain.dataset.encoding_spec import EncodingSpec
from mmtrain.dataset.validate import FaultPolicy, LengthLimit, check_samples
from mmtrain.encoding.load import load_processor
from mmtrain.errors import StorageError, UserError, grouped
from mmtrain.progress import QUIET
from mmtrain.scoring.eval_samples import EvalSamples
from mmtrain.train.dataset import Dataset
from mmtrain.train.report import data_line
from support.builders import TINY, write_jsonl
from test_containers import parquet, png, shard

LONG = "so " * 60


def config_for(path: Path, **keys: Any) -> Config:
    data = {"train": [{"path": str(path)}], "max_length": 60, "too_long": "drop", **keys}
    return Config.model_validate({"model": {"path": str(TINY)}, "data": data, "run": {"output_dir": "runs/none"}})


def rows() -> list[dict[str, Any]]:
    """Three that are sound, one too long, three with faults."""
    return [
        {"question": "what?", "answer": "red"},
        {"question": "what?", "answer": 5},
        {"question": "what?", "answer": LONG},
        {"question": "what?", "answer": "blue", "image": "nowhere.png"},
        {"question": "what?", "answer": "blue"},
        {"question": "<image>what?", "answer": "blue"},
        {"question": "what?", "answer": "green"},
    ]


def read(config: Config) -> Dataset:
    return Dataset(config, load_processor(config.model.path), QUIET)


def test_what_is_read_is_trained_on_dropped_or_skipped(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", rows())
    dataset = read(config_for(data, on_fault="skip", max_skipped=3))
    checked = dataset.checked
    assert checked.used.tolist() == [0, 4, 6]
    assert [index for index, _ in checked.dropped] == [2]
    assert [index for index, _ in checked.skipped] == [1, 3, 5]
    assert data_line(dataset).endswith(
        "; of 7 read, 1 sample dropped as too long, 3 samples skipped because of faults, listed in dropped.jsonl"
    )
    listed = dataset.dropped_rows()
    assert [row["place"] for row in listed] == [f"{data}:{line}" for line in (2, 3, 4, 6)]
    for row, words in zip(
        listed, ["must be text, not '5'", "over the 60", "No such file", "1 <image> mark"], strict=True
    ):
        assert words in row["reason"]
    assert {index for step in (1, 2) for index in dataset.plan.step(step)} <= {0, 4, 6}


@pytest.mark.parametrize("max_skipped", [2, 0.4])
def test_more_faults_than_the_policy_allows_are_all_named(tmp_path: Path, max_skipped: float) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", rows())
    with pytest.raises(UserError) as caught:
        read(config_for(data, on_fault="skip", max_skipped=max_skipped))
    *faults, last = caught.value.faults
    assert [fault.split(": ")[0] for fault in faults] == [f"{data}:{line}" for line in (2, 4, 6)]
    assert last == (
        "data.max_skipped: 3 of 7 samples have faults, over the 2 that may be skipped: correct them, or raise it"
    )


def test_faults_of_a_file_that_is_split_are_named_once_with_what_to_do(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", rows())
    with pytest.raises(UserError) as caught:
        read(config_for(data, eval={"from": "train", "share": 0.5}))
    *faults, last = caught.value.faults
    assert [fault.split(": ")[0] for fault in faults] == [f"{data}:{line}" for line in (2, 4, 6)]
    assert last == ("data.on_fault: 3 of 7 samples have faults: correct them, or set it to skip to leave them out")


def test_a_share_is_of_the_samples_of_the_set() -> None:
    policy = FaultPolicy("error", "skip", 0.01)
    assert policy.too_many(10, 1000) is None
    assert policy.too_many(11, 1000) is not None
    assert policy.too_many(1, 99) is not None


def test_a_set_without_a_sound_sample_is_refused(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", [rows()[1]])
    with pytest.raises(UserError, match=r"data.jsonl:1: dropped, no sample is left: .*must be text"):
        read(config_for(data, on_fault="skip", max_skipped=1))


def test_many_samples_that_are_too_long_are_one_line(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", [{"question": "what?", "answer": "so " * (60 + i)} for i in range(150)])
    with pytest.raises(UserError) as caught:
        read(config_for(data, too_long="error"))
    assert len(caught.value.faults) == 150
    (line,) = grouped(caught.value.faults)
    assert line.startswith(f"{data}:150 (and 149 more lines: 1, 2, 3 …): ")
    assert line.endswith("set data.too_long to drop")


def test_a_sample_that_its_images_make_too_long_says_so(tmp_path: Path) -> None:
    PIL.Image.new("RGB", (256, 256)).save(tmp_path / "large.png")
    data = write_jsonl(tmp_path / "data.jsonl", [{"question": "what?", "answer": "red", "image": "large.png"}])
    with pytest.raises(
        UserError, match=r"tokens \(256 of images: model\.image_processor can make them smaller\), over"
    ):
        read(config_for(data, too_long="error"))


# --- other containers ---


def containers(folder: Path) -> dict[str, Path]:
    """The same three samples with an image as JSONL with a path, as parquet and as a shard."""
    colours = ("red", "green", "blue")
    found = [{"question": "<image>what?", "answer": colour} for colour in colours]
    for name in ("json", "parquet", "tar"):
        (folder / name).mkdir()
    for colour in colours:
        (folder / "json" / f"{colour}.png").write_bytes(png(colour))
    paths = {
        "json": write_jsonl(folder / "json" / "a.jsonl", [{**row, "image": f"{row['answer']}.png"} for row in found])
    }
    members = [(f"{row['answer']}.json", json.dumps(row).encode()) for row in found]
    members += [(f"{row['answer']}.png", png(row["answer"])) for row in found]
    paths["tar"] = folder / "tar" / "a.tar"
    paths["tar"].write_bytes(shard(sorted(members)))
    return paths


def same_as_json(paths: dict[str, Path], other: str) -> None:
    made = []
    for name in ("json", other):
        config = config_for(paths[name])
        samples, _ = check_samples(
            EncodingSpec.of(config, config.data.train), load_processor(str(TINY)), LengthLimit(999, "data.max_length")
        )
        order = sorted(range(3), key=lambda index: samples.records.conversation(index).messages[1].text)
        made.append([samples.encoded(index) for index in order])
    for one, two in zip(*made, strict=True):
        assert np.array_equal(one.ids, two.ids)
        assert np.array_equal(one.supervised, two.supervised)
        assert [span.image.size for span in one.images] == [span.image.size for span in two.images] == [(4, 4)]


def test_a_shard_is_encoded_as_the_same_files_are(tmp_path: Path) -> None:
    same_as_json(containers(tmp_path), "tar")


def test_a_parquet_file_is_encoded_as_the_same_files_are(tmp_path: Path) -> None:
    paths = containers(tmp_path)
    rows = [
        {"question": "<image>what?", "answer": colour, "image": {"bytes": png(colour), "path": None}}
        for colour in ("red", "green", "blue")
    ]
    paths["parquet"] = tmp_path / "parquet" / "a.parquet"
    paths["parquet"].write_bytes(parquet(rows))
    same_as_json(paths, "parquet")


@pytest.mark.slow("several commands")
def test_every_command_reads_a_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = containers(tmp_path)["tar"]
    monkeypatch.chdir(tmp_path)
    config = {
        "model": {"path": str(TINY), "dtype": "float32"},
        "data": {"train": [{"path": str(path)}], "eval": [{"path": str(path), "name": "same"}]},
        "train": {"steps": 1, "batch_size": 3},
        "run": {"output_dir": "run"},
    }
    Path("c.yaml").write_text(json.dumps(config))
    outputs = []
    for command in (
        ["inspect-labels", "c.yaml", "--all"],
        ["train", "c.yaml"],
        ["eval", "perplexity", "c.yaml", "--json"],
    ):
        result = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1"}).invoke(app, command)
        assert result.exit_code == 0, result.exception or result.output
        outputs.append(result.stdout)
    assert "Read as question (3)" in outputs[0]
    assert "No faults" in outputs[0]
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert json.loads(outputs[2])["num_samples"] == 3


def test_an_evaluation_names_what_it_skips(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", rows())
    config = config_for(data, on_fault="skip", max_skipped=3)
    found = EvalSamples.of(config, [EvalSource(path=str(data))], load_processor(str(TINY)), QUIET)
    assert found.indices.tolist() == [0, 4, 6]
    assert [entry["place"] for entry in found.dropped] == [f"{data}:{line}" for line in (2, 3, 4, 6)]


def test_a_full_disk_is_no_fault_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise StorageError("no room")

    monkeypatch.setattr("mmtrain.train.dataset.check_samples", fail)
    with pytest.raises(StorageError) as caught:
        read(config_for(write_jsonl(tmp_path / "data.jsonl", rows())))
    assert caught.value.faults == ["no room"]
