"""The encoded store: what the encoder makes, made once, and made anew when anything that it depends on changed."""

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmtrain.config.schema import Config, Source
from mmtrain.dataset import encode_all, store
from mmtrain.dataset.encode_all import Recipe
from mmtrain.dataset.samples import SampleSet
from mmtrain.dataset.validate import LengthLimit, check_samples
from mmtrain.encoding.encode import Encoded, Encoder
from mmtrain.encoding.load import load_processor
from mmtrain.errors import StorageError, UserError
from mmtrain.records.chat import Conversation, SampleError, Text
from support.builders import mixed_rows, write_jsonl

MakeConfig = Callable[..., Config]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of the test's own, so that it sees all that is kept."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home" / ".cache" / "mmtrain" / "encoded"


def recipe_of(config: Config) -> Recipe:
    return Recipe.of(config, config.data.train)


def opened(recipe: Recipe, **settings: Any) -> tuple[SampleSet, Any, int]:
    """The samples, what was checked, and how many were encoded for it."""
    counts: list[int] = []
    processor = load_processor(recipe.model_path)
    samples, checked = check_samples(
        recipe, processor, LengthLimit(4096, "data.max_length"), advance=counts.append, **settings
    )
    return samples, checked, sum(counts)


def folders(home: Path) -> list[Path]:
    return sorted(path for path in home.iterdir() if path.is_dir())


def assert_equal_to_the_encoder(recipe: Recipe, samples: SampleSet) -> None:
    plain = SampleSet(recipe.sources, Encoder(load_processor(recipe.model_path), recipe.train_on, recipe.end_of_turn))
    for number in range(len(plain)):
        found, expected = samples.encoded(number), plain.encoded(number)
        assert np.array_equal(found.ids, expected.ids)
        assert np.array_equal(found.supervised, expected.supervised)
        assert found.images == expected.images


def test_what_is_kept_is_what_the_encoder_makes(kind: str, make_config: MakeConfig, home: Path) -> None:
    recipe = recipe_of(make_config(kind))
    for encoded_now in (8, 0):
        samples, checked, count = opened(recipe)
        assert count == encoded_now
        assert_equal_to_the_encoder(recipe, samples)
        plain = [SampleSet(recipe.sources, samples.encoder).encoded(number) for number in range(len(samples))]
        assert checked.num_tokens.tolist() == [one.num_tokens for one in plain]
        assert checked.num_supervised.tolist() == [one.num_supervised for one in plain]
        placeholders = [[span.num_placeholders for span in one.images] for one in plain]
        assert checked.num_image_tokens.tolist() == list(map(sum, placeholders))
        assert checked.image_token_pairs.tolist() == [sum(n**2 for n in counts) for counts in placeholders]
        assert checked.num_images == sum(map(len, placeholders))
    assert len(folders(home)) == 1


@pytest.mark.slow("encodes in several worker processes")
def test_other_processes_make_the_same(
    make_config: MakeConfig, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = mixed_rows(tmp_path, with_images=True)
    data = write_jsonl(tmp_path / "many.jsonl", rows * 40)
    config = make_config("qwen2_5_vl")
    recipe = Recipe.of(config, [Source(path=str(data))])
    alone = list(encode_all.encode_all(recipe, recipe.samples(load_processor(recipe.model_path))))
    monkeypatch.setattr(encode_all, "_MANY", 1)
    monkeypatch.setattr(encode_all, "num_cores", lambda: 2)
    together = list(encode_all.encode_all(recipe, recipe.samples(load_processor(recipe.model_path))))
    assert len(alone) == len(together) == 2
    for one, other in zip(alone, together, strict=True):
        for name in ("num_tokens", "num_supervised", "num_pictures", "ids", "supervised", "spans"):
            assert np.array_equal(getattr(one, name), getattr(other, name)), name
        assert (one.files, one.faults, one.notes) == (other.files, other.faults, other.notes)


@pytest.mark.parametrize(
    "name", ["ids.bin", "supervised.bin", "samples.npz", "pictures.json", "findings.json", "meta.json"]
)
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_damaged_store_is_made_anew(name: str, how: str, make_config: MakeConfig, home: Path) -> None:
    recipe = recipe_of(make_config("qwen2_5_vl"))
    opened(recipe)
    path = folders(home)[0] / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    if how != "gone":
        path.write_bytes(content if how == "flipped" else content[: len(content) // 2])
    samples, _, count = opened(recipe)
    assert count == 8
    assert_equal_to_the_encoder(recipe, samples)


def changed_record(config: Config, folder: Path) -> Recipe:
    path = Path(config.data.train[0].path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["messages"][-1]["content"] += " more"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return recipe_of(config)


def changed_template(config: Config, folder: Path) -> Recipe:
    shutil.copytree(config.model.path, folder / "other")
    template = folder / "other" / "chat_template.jinja"
    template.write_text(template.read_text().replace("You are a helpful assistant.", "You help."))
    return Recipe(str(folder / "other"), tuple(config.data.train), "assistant", True)


def changed_pixels_limit(config: Config, folder: Path) -> Recipe:
    shutil.copytree(config.model.path, folder / "other")
    path = folder / "other" / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    for key in ("max_pixels", "longest_edge"):
        settings.pop(key, None)
    settings["size"] = {"shortest_edge": 784, "longest_edge": 3136}
    path.write_text(json.dumps(settings))
    return Recipe(str(folder / "other"), tuple(config.data.train), "assistant", True)


CHANGES: dict[str, Callable[[Config, Path], Recipe]] = {
    "a record": changed_record,
    "the template": changed_template,
    "the pictures' limits": changed_pixels_limit,
    "the turns": lambda config, _: Recipe(config.model.path, tuple(config.data.train), "last", True),
    "the ends": lambda config, _: Recipe(config.model.path, tuple(config.data.train), "assistant", False),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_it_depends_on_makes_another_store(what: str, make_config: MakeConfig, tmp_path: Path, home: Path) -> None:
    config = make_config("qwen2_5_vl")
    opened(recipe_of(config))
    recipe = CHANGES[what](config, tmp_path)
    samples, _, count = opened(recipe)
    assert count == 8
    assert len(folders(home)) == 2
    assert_equal_to_the_encoder(recipe, samples)


def test_an_image_that_changed_or_is_gone_is_noticed(make_config: MakeConfig, home: Path) -> None:
    import PIL.Image

    config = make_config("qwen2_5_vl")
    recipe = recipe_of(config)
    opened(recipe)
    picture = Path(config.data.train[0].path).parent / "images" / "0.png"
    PIL.Image.new("RGB", (196, 84)).save(picture)
    samples, _, count = opened(recipe)
    assert count == 8
    assert_equal_to_the_encoder(recipe, samples)
    picture.unlink()
    with pytest.raises(UserError, match=r"mixed\.jsonl:1: the image 'images/0\.png'.*No such file"):
        opened(recipe)


def test_faults_are_named_every_time_and_nothing_is_kept(make_config: MakeConfig, tmp_path: Path, home: Path) -> None:
    rows = [*mixed_rows(tmp_path, with_images=False), {"messages": [{"role": "assistant", "content": "first"}]}]
    data = write_jsonl(tmp_path / "faulty.jsonl", rows)
    recipe = Recipe.of(make_config("text"), [Source(path=str(data))])
    for _ in range(2):
        with pytest.raises(UserError, match=rf"faulty\.jsonl:{len(rows)}: "):
            opened(recipe)
        assert folders(home) == []


def test_the_limit_of_length_is_no_part_of_it(make_config: MakeConfig, home: Path) -> None:
    recipe = recipe_of(make_config("text"))
    processor = load_processor(recipe.model_path)
    _, whole = check_samples(recipe, processor, LengthLimit(4096, "data.max_length"))
    limit = int(whole.num_tokens.max()) - 1
    with pytest.raises(UserError, match="allowed"):
        check_samples(recipe, processor, LengthLimit(limit, "data.max_length"))
    _, kept = check_samples(recipe, processor, LengthLimit(limit, "data.max_length"), "drop")
    longest = int(whole.num_tokens.argmax())
    assert longest in [index for index, _ in kept.dropped]
    assert kept.num_tokens[longest] == kept.num_supervised[longest] == 0
    assert len(folders(home)) == 1


def test_several_at_once_make_it_once(make_config: MakeConfig, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(make_config("text"))
    made, waited = [], []
    real = encode_all.encode_all

    def slowly(*args: Any) -> Any:
        made.append(threading.current_thread().name)
        threading.Event().wait(0.5)
        return real(*args)

    monkeypatch.setattr(store, "encode_all", slowly)
    processor = load_processor(recipe.model_path)
    checked = []

    def run() -> None:
        checked.append(
            check_samples(recipe, processor, LengthLimit(4096, "data.max_length"), tick=lambda: waited.append(1))[
                1
            ].num_tokens.tolist()
        )

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert waited
    assert checked[0] == checked[1] == checked[2]


def test_a_home_that_cannot_be_written_to_is_done_without(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = sorted(tmp_path.iterdir())
    recipe = recipe_of(make_config("qwen2_5_vl"))
    samples, _, count = opened(recipe)
    assert count == 8
    assert_equal_to_the_encoder(recipe, samples)
    assert [path for path in sorted(tmp_path.iterdir()) if path not in before] == [tmp_path / "data-qwen2_5_vl"]
    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(StorageError, match=r"encoded samples can be written neither.*No space"):
        opened(recipe)


def refuse(*args: Any, **kwargs: Any) -> str:
    raise OSError(28, "No space left on device")


def test_stores_that_nobody_opens_any_more_are_removed(
    make_config: MakeConfig, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("text")
    opened(recipe_of(config))
    (old,) = folders(home)
    os.utime(old, (0, 0))
    opened(Recipe(config.model.path, tuple(config.data.train), "last", True))
    assert old not in folders(home)
    assert len(folders(home)) == 1


def test_many_give_what_one_by_one_give(make_config: MakeConfig) -> None:
    """Also where some are refused, and where words hold special tokens."""
    recipe = recipe_of(make_config("qwen2_5_vl"))
    samples = recipe.samples(load_processor(recipe.model_path))
    conversations = [samples.conversation(number) for number in range(len(samples))]
    root = Path(recipe.sources[0].path).parent
    words = ("<|im_end|>", "", "a<|im_start|>b <|image_pad|>", " lead and trail ", "<|im_", "ü\n\n\n🙂")
    for text in words:
        first = conversations[0].messages
        changed = [replace(message, parts=(*message.parts[:-1], Text(text))) for message in first]
        conversations.append(replace(conversations[0], messages=tuple(changed)))
    conversations.append(replace(conversations[0], messages=conversations[0].messages[-1:]))
    found = samples.encoder.encode_many([(conversation, root) for conversation in conversations])
    expected = [encoded_alone(samples.encoder, conversation, root) for conversation in conversations]
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
    opened(recipe_of(make_config("text")))
    assert len(folders(tmp_path / "elsewhere" / "mmtrain" / "encoded")) == 1
