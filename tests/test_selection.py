"""Duplicates, held-out samples and `max_samples`: which samples are used, and that none is lost silently."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from typer.testing import CliRunner

from mmtrain.cli import app
from mmtrain.config import load_config
from mmtrain.config.schema import Config
from mmtrain.encoding.load import load_processor
from mmtrain.errors import UserError
from mmtrain.inspect_labels.audit import audit
from mmtrain.inspect_labels.chosen import look_at
from mmtrain.inspect_labels.selected_samples import open_selected
from mmtrain.progress import QUIET
from mmtrain.scoring.eval_samples import EvalSamples
from mmtrain.train.dataset import Dataset
from mmtrain.train.fingerprint import fingerprints
from mmtrain.train.report import data_line
from support.builders import TINY, write_jsonl

Row = dict[str, Any]


def qa(answer: str, images: tuple[str, ...] = (), question: str = "what?") -> Row:
    marks = "<image>" * len(images)
    turns = [{"role": "user", "content": marks + question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **({"images": list(images)} if images else {})}


def sections(*paths: Path, train: Row | None = None, **data: Any) -> Row:
    sources = [{"path": str(path), **(train or {})} for path in paths]
    return {"model": {"path": str(TINY)}, "data": {"train": sources, **data}, "run": {"output_dir": "runs/none"}}


def read(*paths: Path, train: Row | None = None, **data: Any) -> Dataset:
    config = Config.model_validate(sections(*paths, train=train, **data))
    return Dataset(config, load_processor(config.model.path), QUIET)


def draw_images(folder: Path, *names: str) -> None:
    """Images of different colours; names that begin with the same letter are the same file byte for byte."""
    for name in names:
        seed = ord(name[0])
        PIL.Image.new("RGB", (64, 64), (seed, 255 - seed, seed // 2)).save(folder / name)


# --- duplicates


def test_a_duplicate_has_the_same_tokens_and_the_same_image_bytes(tmp_path: Path) -> None:
    draw_images(tmp_path, "a1.png", "a2.png", "b1.png")
    rows = [
        qa("red", ("a1.png",)),
        qa("red", ("a2.png",)),  # another file with the same bytes
        qa("red", ("b1.png",)),
        qa("red"),
        qa("blue"),
        qa("red"),
        qa("red", ("a1.png", "b1.png")),
        qa("red", ("b1.png", "a1.png")),  # another order
    ]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    assert read(data).checked.used.tolist() == list(range(8))
    dataset = read(data, dedup=True)
    assert dataset.checked.used.tolist() == [0, 2, 3, 4, 6, 7]
    assert [(row["line"], row["reason"]) for row in dataset.dropped_rows()] == [
        (2, f"the same as {data}:1 (data.dedup)"),
        (6, f"the same as {data}:4 (data.dedup)"),
    ]
    assert "of 8 read, 2 samples left out as duplicates, listed in dropped.jsonl" in data_line(dataset)
    assert dataset.checked.num_images == 6


def test_duplicates_in_other_files_are_found(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", [qa("red"), qa("blue")])
    second = write_jsonl(tmp_path / "b.jsonl", [qa("green"), qa("red")])
    dataset = read(first, second, dedup=True)
    assert dataset.checked.used.tolist() == [0, 1, 2]
    assert dataset.dropped_rows()[0]["place"] == f"{second}:2"


# --- a maximum


@pytest.mark.slow("several commands")
def test_max_samples_is_a_random_choice_that_stays_the_same(tmp_path: Path) -> None:
    rows = [qa(f"word {number}") for number in range(60)]
    few, more = write_jsonl(tmp_path / "a.jsonl", rows[:50]), write_jsonl(tmp_path / "b.jsonl", rows)
    chosen = read(few, train={"max_samples": 20}).checked.used.tolist()
    assert len(chosen) == 20
    assert chosen != list(range(20))
    assert read(few, train={"max_samples": 20}).checked.used.tolist() == chosen
    with_more = read(more, train={"max_samples": 20}).checked.used.tolist()
    assert len(set(chosen) & set(with_more)) >= 15  # a sixth more data replaces about as many
    assert read(few, train={"max_samples": 50}).checked.used.tolist() == list(range(50))
    assert "30 samples over max_samples" in data_line(read(few, train={"max_samples": 20}))


def test_each_source_has_its_own_maximum(tmp_path: Path) -> None:
    paths = [write_jsonl(tmp_path / f"{n}.jsonl", [qa(f"word {n} {i}") for i in range(10)]) for n in range(2)]
    dataset = read(*paths, train={"max_samples": 3})
    assert np.bincount(dataset.train.records.sources_of(dataset.checked.used)).tolist() == [3, 3]


# --- the split

HELD_OUT = {"from": "train", "share": 0.3}


def sides(*paths: Path, **data: Any) -> tuple[set[str], set[str]]:
    """The replies that are trained on, and those that are held out."""
    dataset = read(*paths, eval=HELD_OUT, **data)

    def replies(samples: Any, checked: Any) -> set[str]:
        found = [samples.records.conversation(index).messages[-1].text for index in checked.used.tolist()]
        assert len(set(found)) == len(found)
        return set(found)

    (held_out,) = dataset.eval
    return replies(dataset.train, dataset.checked), replies(held_out.samples, held_out.checked)


def test_held_out_samples_are_not_trained_on_and_none_is_lost(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", [qa(f"word {number}") for number in range(200)])
    training, held_out = sides(data)
    assert not training & held_out
    assert len(training | held_out) == 200
    assert 40 <= len(held_out) <= 80
    dataset = read(data, eval=HELD_OUT)
    assert f"{len(held_out)} samples held out for evaluation" in data_line(dataset)
    assert dataset.eval[0].name == "held-out"
    trained = {index for step in range(1, dataset.plan.steps_per_epoch + 1) for index in dataset.plan.step(step)}
    assert trained == set(dataset.checked.used.tolist())


def test_the_sides_stay_the_same_in_another_order_with_more_data_and_in_other_files(tmp_path: Path) -> None:
    rows = [qa(f"word {number}") for number in range(100)]
    training, held_out = sides(write_jsonl(tmp_path / "a.jsonl", rows))
    random.Random(0).shuffle(rows)
    more = [qa(f"another {number}") for number in range(100)]
    both = [write_jsonl(tmp_path / "b.jsonl", rows[:40] + more), write_jsonl(tmp_path / "c.jsonl", rows[40:])]
    with_more = sides(*both)
    assert training < with_more[0]
    assert held_out < with_more[1]


def test_samples_with_the_same_image_are_on_one_side(tmp_path: Path) -> None:
    letters = [chr(ord("A") + number) for number in range(26)]
    draw_images(tmp_path, *(f"{letter}{copy}.png" for letter in letters for copy in (1, 2)))
    rows = [qa(f"{letter} {copy} {i}", (f"{letter}{copy}.png",)) for letter in letters for copy in (1, 2) for i in "xy"]
    links = [("A", "B"), ("C", "D")]
    rows += [qa(f"link {letter}", (f"{letter}1.png", f"{other}2.png")) for letter, other in links]
    training, held_out = sides(write_jsonl(tmp_path / "data.jsonl", rows))
    assert len(training) + len(held_out) == len(rows)
    side = {reply: reply in held_out for reply in training | held_out}
    for letter in letters:
        assert len({on for reply, on in side.items() if reply.startswith(f"{letter} ")}) == 1
    for letter, other in links:  # connected by a sample with both images
        own = [on for reply, on in side.items() if reply[0] in (letter, other) or reply == f"link {letter}"]
        assert len(set(own)) == 1
    assert 0 < len(held_out) < len(rows) / 2


@pytest.mark.slow("several runs")
def test_the_other_commands_see_the_same_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", [qa(f"word {number}") for number in range(50)])
    config = Config.model_validate(sections(data, eval=HELD_OUT))
    training, held_out = read(data, eval=HELD_OUT).checked.used.tolist(), read(data, eval=HELD_OUT).eval[0].checked.used
    samples = EvalSamples.of(config, config.data.eval, load_processor(str(TINY)), QUIET)
    assert samples.indices.tolist() == held_out.tolist()
    assert samples.names == ("held-out",)
    for split, used in (("train", training), ("eval", held_out.tolist())):
        seen = look_at(config, split, lambda number, own: list(own)).views
        assert [view.index for view in seen] == used
        report = audit(config, split)
        assert report.total("num_samples") == len(used)
        assert sum(report.left_out.values()) == 50 - len(used)


@pytest.mark.slow("several commands")
def test_the_commands_choose_as_training_does_where_samples_are_left_out(tmp_path: Path) -> None:
    """A maximum counts the samples that can be used: not the too long and the faulty ones."""
    rows = [qa("word " * 90 if number % 4 == 0 else 5 if number % 4 == 1 else f"word {number}") for number in range(40)]  # type: ignore[arg-type]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    policy = {"max_length": 60, "too_long": "drop", "on_fault": "skip", "max_skipped": 20}
    config = Config.model_validate(sections(data, train={"max_samples": 7}, **policy))
    used = read(data, train={"max_samples": 7}, **policy).checked.used.tolist()
    assert len(used) == 7
    assert open_selected(config, "train", load_processor(str(TINY)), QUIET).used.tolist() == used
    seen = look_at(config, "train", lambda number, own: list(own)).views
    assert [view.index for view in seen] == used
    assert audit(config).left_out == {"over max_samples": 13}


def test_a_share_that_leaves_a_side_empty_is_refused(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", [qa("word")])
    with pytest.raises(UserError, match=r"of 1 sample that can be used none is left for (training|evaluation)"):
        read(data, eval=HELD_OUT)


@pytest.mark.slow("several commands")
def test_another_share_is_another_training_set(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", [qa(f"word {number}") for number in range(50)])
    found = []
    for keys in ({}, {"eval": HELD_OUT}, {"eval": HELD_OUT | {"share": 0.5}}, {"dedup": True}):
        config = Config.model_validate(sections(data, **keys))
        found.append(fingerprints(config, read(data, **keys), lambda: None).get("data.train.used"))
    assert found[0] is None  # all of it is used
    assert len({*found}) == 4


@pytest.mark.slow("twelve data sets")
def test_few_samples_have_both_sides(tmp_path: Path) -> None:
    for seed in range(12):
        data = write_jsonl(tmp_path / f"{seed}.jsonl", [qa(f"word {seed} {number}") for number in range(2)])
        training, held_out = sides(data)
        assert (len(training), len(held_out)) == (1, 1)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{from: train}", "data.eval.0: `from: train` and `share` belong together"),
        ("{share: 0.1}", "data.eval.0: `from: train` and `share` belong together"),
        (
            "{from: train, share: 0.1, root: images}",
            "data.eval.0: `from: train` reads what data.train says: remove root",
        ),
        ("{from: train, share: 1.5}", "data.eval.0.share: expected a number less than 1, not '1.5'"),
        ("{from: test, share: 0.1}", "data.eval.0.from: expected 'train', not 'test'"),
        ("{frm: train}", "data.eval.0.frm: unknown key; did you mean 'from'?"),
        ("{name: a}", "data.eval.0: needs a path, or `from: train` with a share"),
        ("[{from: train, share: 0.1}, {from: train, share: 0.2}]", "more than one entry of eval is `from: train`"),
    ],
)
def test_a_wrong_entry_is_refused_by_its_key(source: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    data = write_jsonl(tmp_path / "data.jsonl", [qa("red")])
    text = f"model: {{path: {TINY}}}\ndata:\n  train: {data}\n  eval: {source}\nrun: {{output_dir: out}}\n"
    (tmp_path / "c.yaml").write_text(text.replace("root: images", f"root: {tmp_path}/images"))
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "c.yaml")
    assert any(words in fault for fault in caught.value.faults), caught.value.faults


def test_train_and_eval_print_their_samples(tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", [qa(f"word {number}") for number in range(30)])
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps(sections(data, eval=HELD_OUT)))
    done = CliRunner().invoke(app, ["inspect-labels", str(config), "--all", "--split", "eval"])
    held_out = len(read(data, eval=HELD_OUT).eval[0].checked.used)
    assert f"Left out: {30 - held_out} trained on" in done.output
