"""The encoded store: what the encoder makes, made once, and made anew when anything that it depends on changed."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from mmtrain.config.data_section import Source
from mmtrain.config.schema import Config
from mmtrain.dataset import encode_all, store, store_pieces
from mmtrain.dataset.encoded_chunk import EncodedChunk, Fault, Note, join_chunks
from mmtrain.dataset.encoding_spec import EncodingSpec
from mmtrain.dataset.samples import StoredSamples
from mmtrain.dataset.store_file import EncodedStore, write_chunk, write_joined
from mmtrain.dataset.validate import CheckedSamples, FaultPolicy, LengthLimit, check_samples
from mmtrain.encoding.encode import Encoded, Encoder
from mmtrain.encoding.load import load_processor
from mmtrain.errors import StorageError, UserError
from mmtrain.progress import Progress, Task
from mmtrain.records.chat import Conversation, SampleError, Text
from mmtrain.records.record_set import RecordSet
from support import killed_encoding
from support.builders import mixed_rows, write_jsonl
from support.fresh_samples import FreshSamples

MakeConfig = Callable[..., Config]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own, so that it sees all that is kept."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home" / ".cache" / "mmtrain" / "encoded"


def spec_of(config: Config) -> EncodingSpec:
    return EncodingSpec.of(config, config.data.train)


def opened(spec: EncodingSpec, **settings: Any) -> tuple[StoredSamples, CheckedSamples, int]:
    """The samples, what was checked, and how many were encoded for it."""
    counts: list[int] = []
    processor = load_processor(spec.model_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Task, "advance", lambda self, number: counts.append(number))
        samples, checked = check_samples(spec, processor, LengthLimit(4096, "data.max_length"), **settings)
    return samples, checked, sum(counts)


def stores(home: Path) -> list[Path]:
    """What is stored, without the locks."""
    return sorted(path for path in home.iterdir() if path.suffix != ".lock")


def assert_equal_to_the_encoder(spec: EncodingSpec, samples: StoredSamples) -> None:
    encoder = Encoder(load_processor(spec.model_path), spec.train_on, spec.end_of_turn)
    plain = FreshSamples(RecordSet(spec.sources), encoder)
    for number in range(len(plain)):
        found, expected = samples.encoded(number), plain.encoded(number)
        assert np.array_equal(found.ids, expected.ids)
        assert np.array_equal(found.supervised, expected.supervised)
        assert found.images == expected.images


def test_what_is_kept_is_what_the_encoder_makes(kind: str, make_config: MakeConfig, home: Path) -> None:
    spec = spec_of(make_config(kind))
    for encoded_now in (8, 0):
        samples, checked, count = opened(spec)
        assert count == encoded_now
        assert_equal_to_the_encoder(spec, samples)
        fresh = FreshSamples(samples.records, spec.encoder(load_processor(spec.model_path)))
        plain = [fresh.encoded(number) for number in range(len(fresh))]
        assert checked.num_tokens.tolist() == [one.num_tokens for one in plain]
        assert checked.num_supervised.tolist() == [one.num_supervised for one in plain]
        placeholders = [[span.num_placeholders for span in one.images] for one in plain]
        assert checked.num_image_tokens.tolist() == list(map(sum, placeholders))
        assert checked.image_token_pairs.tolist() == [sum(n**2 for n in counts) for counts in placeholders]
        assert checked.num_images == sum(map(len, placeholders))
    assert len(stores(home)) == 1


@pytest.mark.slow("encodes in several worker processes")
def test_other_processes_make_the_same(
    make_config: MakeConfig, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = mixed_rows(tmp_path, with_images=True)
    data = write_jsonl(tmp_path / "many.jsonl", rows * 40)
    config = make_config("qwen2_5_vl")
    spec = EncodingSpec.of(config, [Source(path=str(data))])
    alone = list(encode_all.encode_all(spec, spec.records(), load_processor(spec.model_path)))
    monkeypatch.setattr(encode_all, "_MANY", 1)
    monkeypatch.setattr(encode_all, "num_cores", lambda: 2)
    together = list(encode_all.encode_all(spec, spec.records(), load_processor(spec.model_path)))
    assert len(alone) == len(together) == 2
    for one, other in zip(alone, together, strict=True):
        for name in ("num_tokens", "num_supervised", "num_images", "ids", "supervised", "spans"):
            assert np.array_equal(getattr(one, name), getattr(other, name)), name
        assert (one.image_files, one.faults, one.notes) == (other.image_files, other.faults, other.notes)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "longer": lambda content: content + b"\0",
    "zeros": lambda content: content[: len(content) // 2] + bytes(len(content) - len(content) // 2),
}


@pytest.mark.slow("several data sets are encoded")
@pytest.mark.parametrize("how", [*DAMAGES, "gone"])
def test_a_damaged_store_is_made_anew(how: str, make_config: MakeConfig, home: Path) -> None:
    spec = spec_of(make_config("qwen2_5_vl"))
    opened(spec)
    (path,) = stores(home)
    content = path.read_bytes()
    path.unlink()
    if how != "gone":
        path.write_bytes(DAMAGES[how](content))
    samples, _, count = opened(spec)
    assert count == 8
    EncodedStore(path)
    assert_equal_to_the_encoder(spec, samples)


def chunk(first: int, note: str) -> EncodedChunk:
    """Two samples: three tokens and an image, and one that is refused."""
    return EncodedChunk(
        np.array([first, first + 1], np.int32),
        np.array([-1, -1], np.int32),
        np.array([3, 0], np.int32),
        np.array([1, 0], np.int32),
        np.array([1, 0], np.int32),
        np.array([1, 0], np.int32),
        np.array([0.5, 0.0]),
        np.array([first, first + 1, first + 2], np.int32),
        np.array([False, False, True]),
        np.array([[0, 2, 1, 30 + first, 20]], np.int32),
        np.array([0.5 + first], np.float32),
        (__file__,),
        (f"{__file__}.missing",),
        (Fault(1, "refused", "ünknown"),),
        {"literal": Note(1, 0, note)},
    )


def test_a_store_of_several_chunks_gives_back_each_sample(tmp_path: Path) -> None:
    for number, note in ((0, "a"), (2, "b")):
        write_chunk(tmp_path / note, chunk(number, note))
    write_joined(tmp_path / "joined", [EncodedStore(tmp_path / note) for note in "ab"])
    write_chunk(tmp_path / "at once", join_chunks([chunk(0, "a"), chunk(2, "b")]))
    assert (tmp_path / "joined").read_bytes() == (tmp_path / "at once").read_bytes()
    with safe_open(tmp_path / "joined", framework="np") as file:
        assert file.get_tensor("ids").tolist() == [0, 1, 2, 2, 3, 4]
    opened_store = EncodedStore(tmp_path / "joined")
    assert opened_store.records.tolist() == [0, 1, 2, 3]
    assert [opened_store.tokens(index)[0].tolist() for index in (0, 2)] == [[0, 1, 2], [2, 3, 4]]
    assert [opened_store.tokens(index)[1].tolist() for index in (0, 2)] == [[False, False, True]] * 2
    assert [opened_store.spans_of(i).tolist() for i in range(4)] == [[[0, 2, 1, 30, 20]], [], [[0, 2, 1, 32, 20]], []]
    assert [opened_store.weights_of(i) for i in range(4)] == [(0.5,), (), (2.5,), ()]
    assert opened_store.sum_weights.tolist() == [0.5, 0.0, 0.5, 0.0]
    assert opened_store.faults == [Fault(1, "refused", "ünknown"), Fault(3, "refused", "ünknown")]
    assert opened_store.notes == {"literal": Note(2, 0, "a")}
    assert opened_store.image_files == {Path(__file__)}
    assert opened_store.num_bytes == (tmp_path / "joined").stat().st_size
    assert opened_store.is_current(lambda: None)


def test_a_flipped_bit_of_any_byte_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    write_chunk(path, chunk(0, "a"))
    content = path.read_bytes()
    unnoticed = []
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        try:
            EncodedStore(path)
        except ValueError:
            continue
        unnoticed.append(at)
    assert unnoticed == []


@pytest.mark.slow("encodes in sixty processes")
def test_an_encoding_killed_at_any_change_of_a_file_resumes_to_the_same_store(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config("qwen2_5_vl")
    command = [sys.executable, killed_encoding.__file__, config.model.path, config.data.train[0].path, str(tmp_path)]
    outcomes = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert len(outcomes) > 20  # changes of files before the end
    assert len({outcome["sha256"] for outcome in outcomes}) == 1
    assert {outcome["encoded"] for outcome in outcomes} == {8, 6, 4, 2, 0}  # pieces of two records are never lost
    assert all(outcome["left"] == [] for outcome in outcomes)


def test_an_interrupted_encoding_resumes_after_its_last_piece(
    make_config: MakeConfig, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(encode_all, "_CHUNK", 2)
    monkeypatch.setattr(store_pieces, "_TOKENS", 1)
    spec = spec_of(make_config("qwen2_5_vl"))
    encode = encode_all.ChunkEncoder.encode
    encoded: list[Sequence[int]] = []

    def interrupted(self: encode_all.ChunkEncoder, records: Sequence[int]) -> EncodedChunk:
        if len(encoded) == 3:
            raise KeyboardInterrupt
        encoded.append(records)
        return encode(self, records)

    with monkeypatch.context() as patch:
        patch.setattr(encode_all.ChunkEncoder, "encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opened(spec)
    (pieces,) = stores(home)
    spoiled = sorted(pieces.iterdir())[2]
    spoiled.write_bytes(spoiled.read_bytes()[:-1])
    samples, _, count = opened(spec, progress=Progress())
    assert count == 4  # of eight: the first two pieces are whole
    assert "encoding resumes after 4 of 8 records" in capsys.readouterr().err
    assert_equal_to_the_encoder(spec, samples)
    assert [path.suffix for path in stores(home)] == [".safetensors"]


def changed_record(config: Config, folder: Path) -> EncodingSpec:
    path = Path(config.data.train[0].path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["messages"][-1]["content"] += " more"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return spec_of(config)


def changed_template(config: Config, folder: Path) -> EncodingSpec:
    shutil.copytree(config.model.path, folder / "other")
    template = folder / "other" / "chat_template.jinja"
    template.write_text(template.read_text().replace("You are a helpful assistant.", "You help."))
    return EncodingSpec(str(folder / "other"), tuple(config.data.train), "assistant", True)


def changed_pixels_limit(config: Config, folder: Path) -> EncodingSpec:
    shutil.copytree(config.model.path, folder / "other")
    path = folder / "other" / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    for key in ("max_pixels", "longest_edge"):
        settings.pop(key, None)
    settings["size"] = {"shortest_edge": 784, "longest_edge": 3136}
    path.write_text(json.dumps(settings))
    return EncodingSpec(str(folder / "other"), tuple(config.data.train), "assistant", True)


CHANGES: dict[str, Callable[[Config, Path], EncodingSpec]] = {
    "a record": changed_record,
    "the template": changed_template,
    "the images' limits": changed_pixels_limit,
    "the turns": lambda config, _: EncodingSpec(config.model.path, tuple(config.data.train), "last", True),
    "the ends": lambda config, _: EncodingSpec(config.model.path, tuple(config.data.train), "assistant", False),
}


@pytest.mark.slow("several data sets are encoded")
@pytest.mark.parametrize("what", CHANGES)
def test_what_it_depends_on_makes_another_store(what: str, make_config: MakeConfig, tmp_path: Path, home: Path) -> None:
    config = make_config("qwen2_5_vl")
    opened(spec_of(config))
    spec = CHANGES[what](config, tmp_path)
    samples, _, count = opened(spec)
    assert count == 8
    assert len(stores(home)) == 2
    assert_equal_to_the_encoder(spec, samples)


def test_an_image_that_changed_or_is_gone_is_noticed(make_config: MakeConfig, home: Path) -> None:
    import PIL.Image

    config = make_config("qwen2_5_vl")
    spec = spec_of(config)
    opened(spec)
    image = Path(config.data.train[0].path).parent / "images" / "0.png"
    PIL.Image.new("RGB", (196, 84)).save(image)
    samples, _, count = opened(spec)
    assert count == 8
    assert_equal_to_the_encoder(spec, samples)
    image.unlink()
    with pytest.raises(UserError, match=r"mixed\.jsonl:1: the image 'images/0\.png'.*No such file"):
        opened(spec)


def test_a_set_with_faults_is_encoded_once(make_config: MakeConfig, tmp_path: Path, home: Path) -> None:
    """The faults are stored too: the second start has the same ones, under either policy."""
    rows = [*mixed_rows(tmp_path, with_images=False), {"messages": [{"role": "assistant", "content": "first"}]}]
    data = write_jsonl(tmp_path / "faulty.jsonl", rows)
    spec = EncodingSpec.of(make_config("text"), [Source(path=str(data))])
    skipped = []
    for encoded_now in (len(rows), 0):
        _, checked, count = opened(spec, policy=FaultPolicy(on_fault="skip", max_skipped=1))
        assert count == encoded_now
        skipped.append(checked.skipped)
        with pytest.raises(UserError, match=rf"faulty\.jsonl:{len(rows)}: .*begins with the assistant"):
            opened(spec)
    assert skipped[0] == skipped[1]
    assert [index for index, _ in skipped[0]] == [len(rows) - 1]
    assert len(stores(home)) == 1


def test_a_missing_image_that_appears_is_noticed(make_config: MakeConfig, home: Path) -> None:
    config = make_config("qwen2_5_vl")
    image = Path(config.data.train[0].path).parent / "images" / "0.png"
    content = image.read_bytes()
    image.unlink()
    spec = spec_of(config)
    policy = FaultPolicy(on_fault="skip", max_skipped=8)
    missing = [opened(spec, policy=policy) for _ in range(2)]
    assert [count for *_, count in missing] == [8, 0]
    assert missing[0][1].skipped == missing[1][1].skipped != ()
    assert image.resolve() not in missing[1][1].image_files
    image.write_bytes(content)
    samples, checked, count = opened(spec)
    assert (count, checked.skipped) == (8, ())
    assert_equal_to_the_encoder(spec, samples)


def test_the_limit_of_length_is_no_part_of_it(make_config: MakeConfig, home: Path) -> None:
    spec = spec_of(make_config("text"))
    processor = load_processor(spec.model_path)
    _, whole = check_samples(spec, processor, LengthLimit(4096, "data.max_length"))
    limit = int(whole.num_tokens.max()) - 1
    with pytest.raises(UserError, match="allowed"):
        check_samples(spec, processor, LengthLimit(limit, "data.max_length"))
    _, kept = check_samples(spec, processor, LengthLimit(limit, "data.max_length"), FaultPolicy("drop"))
    longest = int(whole.num_tokens.argmax())
    assert longest in [index for index, _ in kept.dropped]
    assert kept.num_tokens[longest] == kept.num_supervised[longest] == 0
    assert len(stores(home)) == 1


def test_several_at_once_make_it_once(make_config: MakeConfig, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(make_config("text"))
    made, waited = [], []
    real = encode_all.encode_all

    def slowly(*args: Any) -> Any:
        made.append(threading.current_thread().name)
        threading.Event().wait(0.5)
        return real(*args)

    monkeypatch.setattr(store, "encode_all", slowly)
    processor = load_processor(spec.model_path)
    checked = []

    def run() -> None:
        progress = Progress(lambda: waited.append(1), quiet=True)
        _, found = check_samples(spec, processor, LengthLimit(4096, "data.max_length"), progress=progress)
        checked.append(found.num_tokens.tolist())

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert waited
    assert checked[0] == checked[1] == checked[2]


def test_a_home_that_cannot_be_written_to_is_done_without(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = sorted(tmp_path.iterdir())
    spec = spec_of(make_config("qwen2_5_vl"))
    samples, _, count = opened(spec, progress=Progress())
    assert count == 8
    assert_equal_to_the_encoder(spec, samples)
    assert "file/.cache/mmtrain/encoded (Not a directory): every start encodes them again" in capsys.readouterr().err
    assert [path for path in sorted(tmp_path.iterdir()) if path not in before] == [tmp_path / "data-qwen2_5_vl"]
    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(StorageError, match=r"encoded samples can be written neither.*No space"):
        opened(spec)


def test_a_home_whose_file_system_does_not_lock_files_is_done_without(
    make_config: MakeConfig, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lock(file: Any, tick: Callable[[], None]) -> None:
        if Path(file.name).is_relative_to(home):
            raise OSError(37, "No locks available")

    monkeypatch.setattr(store, "wait_for_lock", lock)
    spec = spec_of(make_config("text"))
    samples, _, count = opened(spec)
    assert count == 8
    assert_equal_to_the_encoder(spec, samples)
    assert stores(home) == []


def refuse(*args: Any, **kwargs: Any) -> str:
    raise OSError(28, "No space left on device")


def test_stores_that_nobody_opens_any_more_are_removed(
    make_config: MakeConfig, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("text")
    opened(spec_of(config))
    (old,) = stores(home)
    os.utime(old, (0, 0))
    opened(EncodingSpec(config.model.path, tuple(config.data.train), "last", True))
    assert old not in stores(home)
    assert len(stores(home)) == 1


def test_many_give_what_one_by_one_give(make_config: MakeConfig) -> None:
    """Also where some are refused, and where words hold special tokens."""
    spec = spec_of(make_config("qwen2_5_vl"))
    records, encoder = spec.records(), spec.encoder(load_processor(spec.model_path))
    conversations = [records.conversation(number) for number in range(len(records))]
    root = Path(spec.sources[0].path).parent
    words = ("<|im_end|>", "", "a<|im_start|>b <|image_pad|>", " lead and trail ", "<|im_", "ü\n\n\n🙂")
    for text in words:
        first = conversations[0].messages
        changed = [replace(message, parts=(*message.parts[:-1], Text(text))) for message in first]
        conversations.append(replace(conversations[0], messages=tuple(changed)))
    conversations.append(replace(conversations[0], messages=conversations[0].messages[-1:]))
    found = encoder.encode_many([(conversation, root) for conversation in conversations])
    expected = [encoded_alone(encoder, conversation, root) for conversation in conversations]
    assert sum(isinstance(one, str) for one in expected) == 1
    for one, other in zip(found, expected, strict=True):
        if isinstance(one, SampleError) or isinstance(other, str):
            assert str(one) == other
        else:
            assert np.array_equal(one.ids, other.ids)
            assert np.array_equal(one.supervised, other.supervised)


def encoded_alone(encoder: Encoder, conversation: Conversation, root: Path) -> Encoded | str:
    try:
        return encoder.encode(conversation, root)
    except SampleError as error:
        return str(error)


def test_the_cache_is_where_the_user_wants_it(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    opened(spec_of(make_config("text")))
    assert len(stores(tmp_path / "elsewhere" / "mmtrain" / "encoded")) == 1
