"""Streaming: the order of the samples, exact resume, the same steps in every process, nothing lost, bounded memory."""

import gc
import gzip
import json
import shutil
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from typer.testing import CliRunner

from mmtrain.cli import app
from mmtrain.config import dump_config
from mmtrain.config.data_section import TrainSource
from mmtrain.config.schema import Config
from mmtrain.dataset.encode_all import ChunkEncoder
from mmtrain.dataset.encoded_chunk import EncodedChunk
from mmtrain.dataset.encoding_spec import EncodingSpec
from mmtrain.dataset.shard_order import ShardOrder
from mmtrain.dataset.stream import Stream, StreamedWindow, StreamState
from mmtrain.dataset.validate import LengthLimit, check_samples
from mmtrain.encoding.load import load_processor
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.errors import UserError
from mmtrain.report.command import report
from mmtrain.runtime.processes import Runtime
from mmtrain.train.run import train
from mmtrain.train.stream_steps import begin_step
from support.builders import TINY, write_jsonl
from support.forked import Server
from test_containers import parquet, png, shard

MakeConfig = Callable[..., Config]
Open = Callable[[Config], Stream]
WORDS = ["red", "blue", "green", "white", "black", "grey", "pink", "brown", "gold", "cyan"]


def row(number: int) -> dict[str, Any]:
    """One whose length and reply say which it is."""
    return {"question": "what is it" + " now" * (number % 7), "answer": f"{WORDS[number % 10]} {number}"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve samples: lines, compressed lines, row groups of two, members of a tar file."""
    found = tmp_path / "shards"
    write_jsonl(found / "a.jsonl", [row(number) for number in range(3)])
    lines = "".join(json.dumps(row(number)) + "\n" for number in range(3, 5))
    (found / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (found / "c.parquet").write_bytes(parquet([row(number) for number in range(5, 9)]))
    members = []
    for number in range(9, 12):
        members += [(f"{number}.json", json.dumps(row(number)).encode()), (f"{number}.png", png("red"))]
    (found / "d.tar").write_bytes(shard(members))
    return found


def config_for(path: Path, window: int = 4, batch_size: int = 3, seed: int = 0, **data: Any) -> Config:
    data = {"train": [{"path": str(path)}], "streaming": {"window": window}, **data}
    settings = {"steps": 8, "batch_size": batch_size, "seed": seed}
    return Config.model_validate(
        {"model": {"path": str(TINY)}, "data": data, "train": settings, "run": {"output_dir": "runs/none"}}
    )


@pytest.fixture(scope="module")
def processor() -> ChatProcessor:
    return load_processor(str(TINY))


@pytest.fixture
def open_stream(processor: ChatProcessor) -> Iterator[Open]:
    """Opens the stream of a config; one at a time, because they share the processor."""
    with ExitStack() as stack:

        def opened(config: Config) -> Stream:
            stack.close()
            stream = Stream(config, processor, LengthLimit(config.data.max_length, "data.max_length"))
            return stack.enter_context(closing(stream))

        yield opened


def places(stream: Stream, steps: Iterable[int]) -> list[list[str]]:
    """The file and line of each sample of some steps."""
    found = []
    for step in steps:
        stream.begin(step)
        found.append([str(stream.place(index)).rpartition("/")[2] for index in stream.step(step)])
    return found


SLOW = pytest.mark.slow("other cases of the same")

# --- the order ---

ALL = [
    *(f"a.jsonl:{line}" for line in (1, 2, 3)),
    *(f"b.jsonl.gz:{line}" for line in (1, 2)),
    *(f"c.parquet#{number}" for number in (1, 2, 3, 4)),
    *(f"d.tar#{key}" for key in (9, 10, 11)),
]
GOLDEN = [
    ["c.parquet#1", "a.jsonl:3", "a.jsonl:1"],
    ["a.jsonl:2", "c.parquet#3", "c.parquet#2"],
    ["b.jsonl.gz:1", "c.parquet#4", "d.tar#9"],
    ["d.tar#10", "d.tar#11", "b.jsonl.gz:2"],
    ["d.tar#10", "d.tar#11", "a.jsonl:1"],
    ["d.tar#9", "c.parquet#3", "a.jsonl:2"],
    ["a.jsonl:3", "c.parquet#4", "b.jsonl.gz:2"],
    ["c.parquet#2", "c.parquet#1", "b.jsonl.gz:1"],
]
"""Two epochs of three windows of four: the same on every machine, in every version."""


def random(length: int, seed: int, epoch: int, stream: int) -> list[int]:
    values = np.random.Philox(key=(seed << 64) | (epoch << 32) | stream).random_raw(length)
    return sorted(range(length), key=lambda index: values[index])


def expected_order(seed: int, epoch: int, window: int) -> list[str]:
    """An epoch by the rules: files, then row groups, at random; then each window at random."""
    in_order: list[str] = []
    for number in random(4, seed, epoch, 0):
        rows = [name for name in ALL if name[0] == "abcd"[number]]
        if number == 2:
            rows = [row for group in random(2, seed, epoch, 2**31 + number) for row in rows[2 * group : 2 * group + 2]]
        in_order += rows
    windows = [in_order[start : start + window] for start in range(0, len(in_order), window)]
    return [rows[at] for number, rows in enumerate(windows) for at in random(len(rows), seed, epoch, number + 1)]


def test_the_order_is_always_the_same(open_stream: Open, folder: Path) -> None:
    assert places(open_stream(config_for(folder)), range(1, 9)) == GOLDEN


@pytest.mark.parametrize(("window", "batch_size", "seed"), [(1, 4, 0), (5, 5, 7), (7, 1, 3), (1000, 12, 1)])
def test_the_order_follows_from_seed_files_and_window(
    open_stream: Open, folder: Path, window: int, batch_size: int, seed: int
) -> None:
    stream = open_stream(config_for(folder, window, batch_size, seed))
    read = [place for step in places(stream, range(1, 1 + 36 // batch_size)) for place in step]
    epochs = [expected_order(seed, epoch, window) for epoch in range(3)]
    assert all(sorted(epoch) == sorted(ALL) for epoch in epochs)
    assert read == [place for epoch in epochs for place in epoch][: len(read)]
    assert len(read) >= 35  # epochs join without a gap: the last step of one may have samples of the next


def test_a_window_reads_from_few_files(open_stream: Open, tmp_path: Path) -> None:
    for number in range(70):
        write_jsonl(tmp_path / "small" / f"{number}.jsonl", [row(number)] if number else [])
    stream = open_stream(config_for(tmp_path / "small", window=1000, batch_size=69))
    assert [window.num_used for window in stream.begin(1)] == [64, 5]
    (names,) = places(stream, [1])
    assert sorted(names) == sorted(f"{number}.jsonl:1" for number in range(1, 70))


def test_a_sample_is_what_it_is_without_streaming(open_stream: Open, processor: ChatProcessor, folder: Path) -> None:
    config = config_for(folder)
    stream, limit = open_stream(config), LengthLimit(4096, "data.max_length")
    spec = EncodingSpec.of(config, config.data.train)
    samples, checked = check_samples(spec, processor, limit)
    index_of = {str(samples.place(index)): index for index in range(len(samples))}
    for step in range(1, 5):
        for number in stream.step(step):
            index = index_of.pop(str(stream.place(number)))
            expected, found = samples.encoded(index), stream.encoded(number)
            assert found.ids.tolist() == expected.ids.tolist()
            assert found.supervised.tolist() == expected.supervised.tolist()
            assert [one.image.source for one in found.images] == [one.image.source for one in expected.images]
            sizes = stream.sizes([number])
            assert sizes.num_tokens.tolist() == [len(expected.ids)]
            assert sizes.num_supervised.tolist() == [expected.supervised.sum()]
            assert sizes.image_token_pairs.tolist() == [checked.image_token_pairs[index]]
    assert not index_of


@pytest.mark.parametrize("batch_size", [1, 5, *(pytest.param(size, marks=SLOW) for size in (3, 16))])
def test_a_stream_resumes_at_any_step(open_stream: Open, folder: Path, batch_size: int) -> None:
    config = config_for(folder, batch_size=batch_size)
    through = open_stream(config)
    expected, states = [], []
    for step in range(1, 10):
        expected += places(through, [step])
        states.append(json.loads(json.dumps(through.state(step).row())))
    for step, state in enumerate(states, start=1):
        resumed = open_stream(config)
        resumed.start(StreamState.of(state))
        assert places(resumed, range(step + 1, 10)) == expected[step:]


def windows_alive() -> int:
    return sum(type(one) is StreamedWindow for one in gc.get_objects())


@pytest.mark.slow("hundreds of windows")
def test_memory_is_bounded(open_stream: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few windows are alive at a time, and the images of a chunk of records."""
    for number in range(30):
        write_jsonl(tmp_path / "shards" / f"{number}.jsonl", [row(number * 10 + line) for line in range(10)])
    at_once: list[int] = []
    encode = ChunkEncoder.encode

    def noted(self: ChunkEncoder, records: Sequence[int]) -> EncodedChunk:
        at_once.append(len(records))
        return encode(self, records)

    monkeypatch.setattr(ChunkEncoder, "encode", noted)
    stream = open_stream(config_for(tmp_path / "shards", window=100, batch_size=7))
    gc.collect()
    others, alive, read = windows_alive() - 2, list[int](), 0
    for step in range(1, 86):
        stream.begin(step)
        read += len(stream.step(step))
        if step in (15, 29, 43, 85):  # the first three have samples of two windows
            alive.append(windows_alive() - others)
    assert read == 85 * 7
    assert max(alive) <= 5  # the first, two of a step on a border, one ahead, one being made
    assert max(at_once) == 64


# --- faults ---


def faulty(folder: Path) -> Path:
    """Of thirty samples number 13 has a fault and number 22 is too long."""
    rows = [row(number) for number in range(30)]
    rows[13]["answer"] = 5
    rows[22]["answer"] = "so " * 200
    for file in range(3):
        write_jsonl(folder / f"{file}.jsonl", rows[10 * file : 10 * file + 10])
    return folder


def test_a_fault_is_an_error_at_the_step_of_its_window(open_stream: Open, tmp_path: Path) -> None:
    stream = open_stream(config_for(faulty(tmp_path / "shards"), window=10, batch_size=5, too_long="drop"))
    names = [name for step in places(stream, range(1, 3)) for name in step]
    assert all(name.startswith(("0.jsonl", "2.jsonl")) for name in names)
    with pytest.raises(UserError, match=r"1\.jsonl:4: .answer. must be text"):
        places(stream, range(3, 6))
    with pytest.raises(UserError, match=r"1\.jsonl:4: .answer. must be text"):  # and again: it is not passed over
        stream.step(5)


@pytest.mark.parametrize("max_skipped", [1, 0.1])
def test_what_is_read_is_used_skipped_or_dropped(open_stream: Open, tmp_path: Path, max_skipped: float) -> None:
    policy: dict[str, Any] = {"on_fault": "skip", "max_skipped": max_skipped, "too_long": "drop", "max_length": 150}
    stream = open_stream(config_for(faulty(tmp_path / "shards"), window=10, batch_size=7, **policy))
    used = [name for step in places(stream, range(1, 5)) for name in step]
    assert len(used) == len(set(used)) == 28
    state = stream.state(4)
    assert (state.num_read, state.num_used, state.num_skipped, state.num_dropped) == (30, 28, 1, 1)
    assert stream.summary(4) == (
        "streaming: 30 samples read: 28 trained on, 1 skipped because of faults, 1 dropped as too long"
    )
    places(stream, range(5, 9))  # in the second epoch the same two are left out again
    assert (stream.state(8).num_skipped, stream.state(8).num_dropped) == (2, 2)


@pytest.mark.parametrize(("max_skipped", "allowed"), [(0, "0"), (0.03, "0")])
def test_more_faults_than_may_be_skipped_are_an_error(
    open_stream: Open, tmp_path: Path, max_skipped: float, allowed: str
) -> None:
    policy: dict[str, Any] = {"on_fault": "skip", "max_skipped": max_skipped, "too_long": "drop", "max_length": 150}
    with pytest.raises(UserError) as error:
        places(open_stream(config_for(faulty(tmp_path / "shards"), window=10, batch_size=7, **policy)), range(1, 5))
    place, reason = error.value.faults
    assert "1.jsonl:4" in place
    assert reason.startswith("data.max_skipped: 1 of ")
    assert f"over the {allowed} that may be skipped" in reason


def test_a_broken_file_is_an_error_at_its_step(open_stream: Open, folder: Path) -> None:
    content = (folder / "c.parquet").read_bytes()
    (folder / "c.parquet").write_bytes(content[: len(content) // 2])
    stream = open_stream(config_for(folder, window=3, batch_size=3))
    assert sorted(*places(stream, [1])) == ALL[:3]
    with pytest.raises(UserError, match=r"c\.parquet: not a whole parquet file"):
        stream.begin(2)


def test_an_epoch_without_a_sample_ends_the_stream(open_stream: Open, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [row(1), row(2)])
    with pytest.raises(UserError, match=r"a\.jsonl:[12]: .* tokens.*the last of 2 samples.* none can be used"):
        open_stream(config_for(tmp_path / "a.jsonl", max_length=3, too_long="drop"))
    write_jsonl(tmp_path / "b.jsonl", [])
    with pytest.raises(UserError, match=r"no records in .*b\.jsonl"):
        open_stream(config_for(tmp_path / "b.jsonl"))


def test_processes_that_read_different_samples_are_refused(open_stream: Open, folder: Path, tmp_path: Path) -> None:
    class Other(Runtime):
        """One of two; the other has read something else."""

        def __init__(self) -> None:
            super().__init__("float32", device="cpu")
            self.num_processes = 2

        def gather(self, values: torch.Tensor) -> torch.Tensor:
            return torch.stack([values, values + 1])

    with pytest.raises(UserError, match="from here on the processes read different samples"):
        begin_step(open_stream(config_for(folder)), 1, Other(), tmp_path)


# --- runs ---


def streamed(make_config: MakeConfig, folder: Path, kind: str = "text", **data: Any) -> Config:
    config = make_config(kind, steps=8, batch_size=3, checkpoint_every=1, keep_checkpoints=20, seed=3)
    given = {**config.model_dump()["data"], "train": [{"path": str(folder)}], "streaming": {"window": 4}, **data}
    return Config.model_validate(config.model_dump() | {"data": given})


def result(config: Config) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor], str]:
    """The rows of the steps, the adapter, and what was dropped."""
    output = Path(config.run.output_dir)
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    same = [{key: row[key] for key in row.keys() - {"seconds", "mfu"}} for row in rows]
    dropped = output / "dropped.jsonl"
    text = dropped.read_text() if dropped.exists() else ""
    return same, load_file(output / "adapter" / "adapter_model.safetensors"), text


def assert_same(found: Any, expected: Any) -> None:
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(found[1][name], value) for name, value in expected[1].items())
    assert found[2] == expected[2]


POLICY: dict[str, Any] = {"on_fault": "skip", "max_skipped": 0.3, "too_long": "drop", "max_length": 150}


@pytest.mark.slow("several runs")
@pytest.mark.parametrize("step", [*(pytest.param(step, marks=SLOW) for step in (1, 3, 4, 5, 6, 7)), 2])
def test_a_run_that_was_cut_off_ends_with_the_same_bits(
    step: int, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated = [{"path": str(write_jsonl(tmp_path / "eval.jsonl", [row(1), row(2)])), "name": "held-out"}]
    config = streamed(make_config, faulty(tmp_path / "shards"), **POLICY, eval=evaluated)
    train(config)
    expected = result(config)
    assert len(expected[0]) == 8 + 2  # evaluated before the first step and after the last
    listed = [json.loads(line) for line in expected[2].splitlines()]
    assert sorted(Path(one["place"]).name for one in listed) == ["1.jsonl:4", "2.jsonl:3"]
    shutil.rmtree(config.run.output_dir)

    def cut_off(row: dict[str, Any]) -> None:
        if row["step"] == step + 1:  # after its windows were read and listed, before it is saved
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, on_step=cut_off)
    train(config)
    assert_same(result(config), expected)


@pytest.mark.slow("several runs")
def test_a_run_with_a_fault_in_the_data_resumes_when_it_is_corrected(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = faulty(tmp_path / "shards")
    config = streamed(make_config, shards, too_long="drop", max_length=150)
    config = config.model_copy(update={"run": config.run.model_copy(update={"checkpoint_every": 100})})
    with pytest.raises(UserError, match=r"1\.jsonl:4: ") as error:
        train(config)
    # the fault is in the fourth window: the three before it, of four samples each, are those of four steps
    assert error.value.faults[-1].endswith("; step 4 is saved: fix the data and run the same command again")
    rows = [row(number) for number in range(10, 20)]
    rows[3]["answer"] = "x"
    write_jsonl(shards / "1.jsonl", rows)
    with pytest.raises(UserError, match=r"data\.train\.0\.files: the content has changed"):
        train(config)
    train(config, accept=["data.train.0.files"])
    assert [row["step"] for row in result(config)[0]] == list(range(1, 9))
    assert "streaming: 3 files, 4 records at a time; in the first window 4 samples" in capsys.readouterr().err
    report([Path(config.run.output_dir)], None, False)
    assert "training, first window" in (Path(config.run.output_dir) / "report.html").read_text()


@pytest.mark.slow("several runs in processes of their own")
@pytest.mark.parametrize("num_rows", [1, 6])
def test_a_killed_run_ends_with_the_same_bits(
    num_rows: int, make_config: MakeConfig, tmp_path: Path, server: Server
) -> None:
    config = streamed(make_config, faulty(tmp_path / "shards"), **POLICY)
    run = config.run.model_copy(update={"checkpoint_every": 2})
    killed = config.model_copy(update={"run": run.model_copy(update={"output_dir": str(tmp_path / "killed")})})
    config = config.model_copy(update={"run": run})
    train(config)
    (tmp_path / "killed.yaml").write_text(dump_config(killed))
    words = ["train", str(tmp_path / "killed.yaml")]
    metrics = tmp_path / "killed" / "metrics.jsonl"
    group = server.start(tmp_path / "logs", words)
    while group.wait(0) == [None]:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= num_rows:
            group.send(0, signal.SIGKILL)
        time.sleep(0.001)
    assert group.wait() == [-signal.SIGKILL]
    server.run(tmp_path / "logs", words)
    assert_same(result(killed), result(config))


@pytest.mark.slow("runs of two processes")
def test_two_processes_take_the_steps_of_one(
    make_config: MakeConfig, folder: Path, tmp_path: Path, server: Server
) -> None:
    config = streamed(make_config, folder, "qwen2_5_vl")
    exact = config.run.model_copy(update={"microbatches": 2})
    config = config.model_copy(update={"run": exact})
    train(config)
    other = config.model_copy(update={"run": exact.model_copy(update={"output_dir": str(tmp_path / "two")})})
    (tmp_path / "two.yaml").write_text(dump_config(other))
    server.run(tmp_path / "logs", ["train", str(tmp_path / "two.yaml")], 2)
    assert_same(result(other), result(config))


# --- other commands ---


@pytest.mark.parametrize("command", ["inspect-labels", "inspect-data", pytest.param("plan", marks=SLOW)])
def test_other_commands_look_at_the_first_file(command: str, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(config_for(folder)))
    done = CliRunner().invoke(app, [command, str(tmp_path / "config.yaml"), "--json"])
    assert done.exit_code == 0, done.output
    words = f"data.streaming: of 4 files only the first one is looked at, {folder / 'a.jsonl'}"
    assert words in done.stderr.replace("\n", "")
    found = [json.loads(line) for line in done.stdout.splitlines()]
    if command == "inspect-labels":
        assert [(one["source"], one["line"]) for one in found] == [(str(folder / "a.jsonl"), n) for n in (1, 2, 3)]
    else:
        (report,) = found
        figures = report["data"]["samples"] if command == "plan" else report["splits"]["train"]["num_samples"]
        assert figures == 3


def test_the_first_file_is_one_with_records(tmp_path: Path) -> None:
    row = {"question": "what?", "answer": "red"}
    for number in range(6):
        write_jsonl(tmp_path / f"{number}.jsonl", [row] if number == 4 else [])
    order = ShardOrder((TrainSource(path=str(tmp_path)),), 0, 10)
    assert order.first == (tmp_path / "4.jsonl", 0)


# --- what does not go together ---

REFUSED = [
    ({"train": {"epochs": 2}}, "data.streaming needs train.steps"),
    ({"run": {"weights": "shard"}}, "data.streaming does not work with run.weights: shard"),
    ({"data": {"dedup": True}}, "dedup does not work with streaming"),
    ({"data": {"eval": [{"from": "train", "share": 0.1}]}}, "`from: train` of eval does not work with streaming"),
    ({"source": {"weight": 2.0}}, "train.0.weight does not work with streaming"),
    ({"source": {"max_samples": 5}}, "train.0.max_samples does not work with streaming"),
    ({"source": {"batch": "own"}}, "train.0.batch: own does not work with streaming"),
    ({"objective": {"kind": "contrastive"}}, "data.streaming does not work with objective.kind: contrastive"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_needs_all_samples_is_refused(changes: dict[str, Any], words: str) -> None:
    source = {"path": "a.jsonl", **changes.get("source", {})}
    config = {
        "model": {"path": "model"},
        "data": {"train": [source], "streaming": True, **changes.get("data", {})},
        "objective": changes.get("objective", {}),
        "train": changes.get("train", {"steps": 3}),
        "run": {"output_dir": "run", **changes.get("run", {})},
    }
    with pytest.raises(ValidationError) as error:
        Config.model_validate(config)
    assert words in str(error.value)


def test_a_step_with_fewer_samples_than_processes_is_refused(make_config: MakeConfig, folder: Path) -> None:
    config = streamed(make_config, folder)
    config = config.model_copy(update={"run": config.run.model_copy(update={"microbatches": 4})})
    with pytest.raises(UserError, match=r"train\.batch_size: 3 with data\.streaming is fewer than 4"):
        train(config)
