"""Contrastive runs end to end: trained, stopped, resumed, exported and loaded by transformers."""

import json
import re
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, CLIPImageProcessorPil

from mmtrain.config import dump_config
from mmtrain.config.schema import Config
from mmtrain.contrastive.embedder import EncodedItem
from mmtrain.contrastive.load import load_embedder
from mmtrain.errors import UserError
from mmtrain.progress import QUIET
from mmtrain.records.chat import Image, SampleError, Text
from mmtrain.records.pairs import Item
from mmtrain.runtime.processes import Runtime
from mmtrain.train import loop
from mmtrain.train.contrastive.evaluations import RetrievalDuringRun
from mmtrain.train.contrastive.pair_dataset import PairDataset
from mmtrain.train.fingerprint import fingerprints
from mmtrain.train.run import train
from mmtrain.train.step import StepResult, train_step
from mmtrain.train.watched import History
from support.builders import TINY
from support.forked import Server
from support.pair_data import pair_config, write_pairs
from support.tower_models import TOWERS

LORA = {"mode": "lora", "rank": 4, "alpha": 8.0, "dropout": 0.1}
SMALL = {"train": {"steps": 5, "batch_size": 9}, "run": {"microbatch_tokens": 100, "checkpoint_every": 2}}
Make = Callable[..., Config]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("contrastive")
    TOWERS["clip"](made / "clip")
    write_pairs(made)
    return made


@pytest.fixture
def make(folder: Path, tmp_path: Path) -> Make:
    def made(file: str = "pairs.jsonl", **sections: Any) -> Config:
        given = {name: SMALL.get(name, {}) | keys if name != "tune" else keys for name, keys in sections.items()}
        return pair_config(folder / "clip", folder / file, tmp_path / "run", **{**SMALL, **given})

    return made


class Stop(Exception):
    """Stands for a process that dies."""


def weights(config: Config) -> dict[str, Tensor]:
    (path,) = Path(config.run.output_dir).glob("*/*model.safetensors")
    return load_file(path)


def rows(config: Config) -> list[dict[str, Any]]:
    lines = (Path(config.run.output_dir) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("seconds", "mfu")} for line in lines]


ADAPTER: dict[str, Any] = {"tune": {"vision": LORA, "language": LORA}, "objective": {"scale": 20.0}}
FULL: dict[str, Any] = {}
LATER = [pytest.param(step, marks=pytest.mark.slow("stops after other steps")) for step in (1, 2, 4)]


@pytest.mark.parametrize("stop_at", [3, *LATER])
@pytest.mark.parametrize("sections", [FULL, ADAPTER], ids=["full", "adapter"])
def test_a_stopped_run_continues_to_the_same_bits(
    sections: dict[str, Any], stop_at: int, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(**sections)
    train(config)
    expected, expected_rows = weights(config), rows(config)
    shutil.rmtree(config.run.output_dir)

    def die(learner: Any, batches: Any, count: int, step: int, norm: float | None) -> StepResult:
        result = train_step(learner, batches, count, step, norm)
        if step == stop_at:
            raise Stop
        return result

    monkeypatch.setattr(loop, "train_step", die)
    with pytest.raises(Stop):
        train(config)
    monkeypatch.undo()
    train(config)
    found = weights(config)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert rows(config) == expected_rows


def early(make: Make, name: str, stopping: Any = None, **run: Any) -> Config:
    """A config that evaluates after each step, and keeps the best checkpoint."""
    data = {"eval": [{"path": str(Path(make().data.train[0].path)), "name": "all"}]}
    train_keys = {"steps": 8, "early_stopping": stopping}
    return make(data=data, train=train_keys, run={"eval_every": 1, "checkpoint_every": 3, "keep_best": name, **run})


RECALLS = {0: 0.1, 1: 0.2, 2: 0.5, 3: 0.4, 4: 0.5, 5: 0.9, 6: 0.3, 7: 0.3, 8: 0.3}
"""By step; the first best value before two without a better one is that of step 2."""


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each evaluation gives `RECALLS` in one direction and 0 in the other, for as many searches."""

    def row(self: RetrievalDuringRun, step: int) -> dict[str, Any]:
        found = {"image_to_text": RECALLS[step], "text_to_image": 0.0}
        return {way: {"recall@1": value, "num_queries": 10} for way, value in found.items()}

    monkeypatch.setattr(RetrievalDuringRun, "row", row)


@pytest.mark.slow("several runs")
@pytest.mark.parametrize("name", ["retrieval/recall@1", "retrieval/all/image_to_text/recall@1"])
def test_a_killed_run_keeps_the_same_best_checkpoint_and_ends_at_the_same_step(
    name: str, evaluated: None, make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = early(make, name, {"metric": name, "patience": 2})
    train(config)
    value = "0.2500" if name == "retrieval/recall@1" else "0.5000"
    printed = capsys.readouterr().err
    assert f"ended early after step 4: {name} has not improved since step 2" in printed
    assert f"best: {config.run.output_dir}/best, after step 2: {name} {value}" in printed
    output = Path(config.run.output_dir)
    files = ("best/model.safetensors", "model/model.safetensors")
    expected = [load_file(output / file) for file in files]
    saved = load_file(output / "checkpoints" / "step-000002" / "trainable.safetensors")
    assert all(torch.equal(expected[0][key], value) for key, value in saved.items() if key in expected[0])
    assert not torch.equal(expected[0]["logit_scale"], expected[1]["logit_scale"])
    output.rename(tmp_path / "whole")

    def die(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            raise Stop

    with pytest.raises(Stop):
        train(config, on_step=die)
    train(config)
    for file, weights_before in zip(files, expected, strict=True):
        found = load_file(output / file)
        assert all(torch.equal(found[key], value) for key, value in weights_before.items())
    train(config)
    assert "has finished early after step 4" in capsys.readouterr().err


@pytest.mark.slow("several runs")
def test_the_watched_figure_is_the_mean_over_the_searches_of_both_directions(make: Make) -> None:
    config = early(make, "retrieval/mrr")
    train(config)
    found = [row for row in rows(config) if "retrieval" in row and row["step"] > 0]
    ways = ("image_to_text", "text_to_image")
    means = [
        sum(row[way]["mrr"] * row[way]["num_queries"] for way in ways) / sum(row[way]["num_queries"] for way in ways)
        for row in found
    ]
    assert found[0]["image_to_text"]["num_queries"] != found[0]["text_to_image"]["num_queries"]
    history = History(found)
    assert list(history.values("retrieval/mrr").values()) == pytest.approx(means, rel=1e-12)
    best = history.best("retrieval/mrr")
    assert best is not None
    assert best.value == pytest.approx(max(means), rel=1e-12)


@pytest.mark.slow("runs of two processes")
def test_two_processes_keep_the_same_best_checkpoint(make: Make, tmp_path: Path, server: Server) -> None:
    config = early(make, "retrieval/mrr", {"metric": "retrieval/mrr", "patience": 2}, microbatches=2)
    train(config)
    run_in(server, 2, config, tmp_path / "two")
    for file in ("best/model.safetensors", "model/model.safetensors"):
        found, expected = load_file(tmp_path / "two" / file), load_file(Path(config.run.output_dir) / file)
        assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("eval/perplexity", "retrieval/recall@1"),
        ("retrieval/image_to_text/recall@2", "retrieval/image_to_text/recall@1"),
        ("retrieval/al/mrr", "retrieval/all/mrr"),
    ],
)
def test_a_figure_that_is_not_evaluated_is_refused(name: str, near: str, make: Make) -> None:
    with pytest.raises(UserError, match=rf"run\.keep_best: '{name}': expected one of 30 figures, such as ") as refused:
        train(early(make, name))
    assert near in str(refused.value)


def run_in(server: Server, processes: int, config: Config, output: Path) -> Config:
    """Train in so many processes, or resume what is in `output`; the config of that run."""
    data = yaml.safe_load(dump_config(config))
    data["run"]["output_dir"] = str(output)
    output.with_suffix(".yaml").write_text(yaml.safe_dump(data))
    group = server.run(output.with_suffix(".logs"), ["train", str(output.with_suffix(".yaml"))], processes)
    assert f"on {processes} process" in group.text
    return Config.model_validate(data)


@pytest.mark.slow("runs of two processes")
def test_two_processes_give_the_bits_of_one(make: Make, folder: Path, tmp_path: Path, server: Server) -> None:
    """Also of the retrieval figures, whose items they share."""
    data = {"eval": [{"path": str(folder / "pairs.jsonl"), "name": "same"}]}
    config = make(run={"microbatches": 2}, data=data)
    one, two = (run_in(server, count, config, tmp_path / f"of-{count}") for count in (1, 2))
    found = weights(two)
    assert all(torch.equal(found[name], value) for name, value in weights(one).items())
    assert any("retrieval" in row for row in rows(one))
    assert rows(two) == rows(one)


def as_if_stopped_after(step: int, finished: Path, output: Path) -> None:
    """A copy of a finished run without its later checkpoints and what it saved at its end."""
    shutil.copytree(finished, output)
    for path in (output / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    for path in (*output.glob("model"), *output.glob("adapter")):
        shutil.rmtree(path)


@pytest.mark.slow("runs of two processes")
@pytest.mark.parametrize(
    ("first", "then", "sections", "microbatches"),
    [(1, 2, FULL, "auto"), (2, 1, ADAPTER, "auto"), (2, 2, FULL, "auto"), (1, 2, ADAPTER, 4), (2, 1, FULL, 4)],
)
def test_a_run_resumes_on_other_processes(
    first: int, then: int, sections: dict[str, Any], microbatches: str | int, make: Make, tmp_path: Path, server: Server
) -> None:
    """Steps of 9 pairs, so processes have unequal shares. On as many processes, and wherever the cut is fixed, the
    bits are the same."""
    config = make(**sections, run={"microbatches": microbatches, "keep_checkpoints": 5})
    whole = run_in(server, first, config, tmp_path / "whole")
    as_if_stopped_after(2, tmp_path / "whole", tmp_path / "resumed")
    resumed = run_in(server, then, config, tmp_path / "resumed")
    found, expected = weights(resumed), weights(whole)
    if first == then or microbatches != "auto":
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert rows(resumed) == rows(whole)
        return
    difference = sum(float((found[name] - value).square().sum()) for name, value in expected.items()) ** 0.5
    assert difference <= 1e-5 * sum(float(value.square().sum()) for value in expected.values()) ** 0.5
    for one, other in zip(rows(resumed), rows(whole), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_the_trained_model_loads_in_transformers(make: Make, folder: Path) -> None:
    """Its embeddings are those of the weights in the last checkpoint, with the trained scale."""
    config = make()
    train(config)
    saved = Path(config.run.output_dir) / "model"
    model = AutoModel.from_pretrained(saved).eval()
    last = load_file(Path(config.run.output_dir) / "checkpoints" / "step-000005" / "trainable.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(value, last[name]), name
    base = AutoModel.from_pretrained(folder / "clip")
    assert abs((model.logit_scale - base.logit_scale).item()) > 1e-3
    inputs = AutoTokenizer.from_pretrained(saved)(["a red circle"], return_tensors="pt")
    pixels = CLIPImageProcessorPil.from_pretrained(saved)(PIL.Image.new("RGB", (40, 40)), return_tensors="pt")
    assert model(**inputs, **pixels).logits_per_image.isfinite().all()


def test_the_adapter_loads_in_peft(make: Make, folder: Path) -> None:
    config = make(**ADAPTER)
    train(config)
    base = AutoModel.from_pretrained(folder / "clip")
    model = PeftModel.from_pretrained(base, Path(config.run.output_dir) / "adapter").eval()
    last = load_file(Path(config.run.output_dir) / "checkpoints" / "step-000005" / "trainable.safetensors")
    found = {name: value for name, value in model.state_dict().items() if "lora_" in name}
    assert found.keys() == last.keys()
    assert all(torch.equal(value, last[name]) for name, value in found.items())


def starting_from(earlier: Path, config: Config) -> Config:
    data = config.model_dump()
    return Config.model_validate(data | {"model": data["model"] | {"adapter": str(earlier)}})


@pytest.mark.slow("several runs")
@pytest.mark.parametrize("sections", [FULL, pytest.param(ADAPTER, marks=pytest.mark.slow("runs of another kind"))])
def test_a_run_starts_from_the_weights_of_an_earlier_one(
    sections: dict[str, Any], make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its first evaluation is the last one of the earlier run, and the temperature continues."""
    source = {"path": str(Path(make().data.train[0].path)), "name": "all"}
    config = make(data={"eval": [source]}, **sections)
    train(config)
    earlier = Path(config.run.output_dir).rename(tmp_path / "earlier")
    lines = [json.loads(line) for line in (earlier / "metrics.jsonl").read_text().splitlines()]
    *_, last = (row for row in lines if "retrieval" in row)
    capsys.readouterr()
    after = starting_from(earlier, make(data={"eval": [source]}, **sections))
    train(after)
    first, *_ = (row for row in rows(after) if "retrieval" in row)
    assert {**first, "step": 5} == {**last, "step": 5}
    num = len(load_file(earlier / "checkpoints" / "step-000005" / "trainable.safetensors"))
    assert f"started from {earlier}: {num} of {num} trainable tensors" in capsys.readouterr().err


@pytest.mark.slow("runs of two kinds")
def test_a_trained_scale_that_would_be_lost_is_refused(make: Make, tmp_path: Path) -> None:
    train(make())
    earlier = Path(make().run.output_dir).rename(tmp_path / "earlier")
    with pytest.raises(UserError, match=r"such as 'logit_scale': set objective\.scale to trained"):
        train(starting_from(earlier, make(objective={"scale": 20.0})))


@pytest.mark.slow("a run")
def test_training_brings_pairs_together(make: Make) -> None:
    train(make(train={"steps": 60, "batch_size": 24, "learning_rate": 3e-3}, run={"checkpoint_every": 500}))
    losses = [row["loss"] for row in rows(make())]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.slow("120 steps")
def test_the_scale_stays_below_its_limit(make: Make) -> None:
    """Every step would raise it: the loss of embeddings that fit falls with it."""
    config = make(objective={"temperature_max": 14.3}, train={"steps": 120, "learning_rate": 3e-3, "batch_size": 24})
    train(config)
    scale = AutoModel.from_pretrained(Path(config.run.output_dir) / "model").logit_scale.exp()
    assert scale.item() == pytest.approx(14.3, rel=1e-6)


def test_a_text_that_is_too_long_is_named(make: Make, folder: Path, tmp_path: Path) -> None:
    path = folder / "long.jsonl"
    path.write_text(
        "".join(
            json.dumps({"image": f"{number}.png", "text": text}) + "\n"
            for number, text in enumerate(["red", "red " * 60, "blue"])
        )
    )
    with pytest.raises(UserError, match=r"long.jsonl:2: \d+ tokens, over the 48 allowed \(the text tower's longest"):
        train(make("long.jsonl"))
    train(make("long.jsonl", data={"too_long": "drop"}, train={"steps": 1}))
    dropped = json.loads((tmp_path / "run" / "dropped.jsonl").read_text())
    assert (dropped["line"], "48 allowed" in dropped["reason"]) == (2, True)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"tune": {"language": LORA}}, "objective.scale: an adapter cannot store trained numbers"),
        ({"objective": {"bias": -1.0}}, "objective.bias is for `loss: sigmoid`"),
        ({"objective": {"loss": "sigmoid", "symmetric": True}}, "objective.symmetric is for `loss: infonce`"),
        ({"objective": {"kind": "chat", "dims": [8]}}, "objective.dims is for `kind: contrastive`"),
        ({"objective": {"kind": "chat"}, "run": {"graph_memory_gib": 1.0}}, "run.graph_memory_gib does not work"),
        ({"run": {"weights": "shard"}}, "run.weights: shard does not work with objective.kind: contrastive"),
        ({"labels": {"end_of_turn": False}}, "labels does not work with objective.kind: contrastive"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_key(sections: dict[str, Any], words: str, make: Make) -> None:
    with pytest.raises(ValueError, match=words):
        make(**sections)


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ({"loss": "sigmoid"}, "objective.bias: trained: the model has no bias of its own: give a number"),
        ({"pooling": "last"}, "objective.pooling: last: a dual encoder"),
        ({"dims": [4, 999]}, "objective.dims: 999 is more than the 16 values"),
    ],
)
def test_what_the_model_lacks_is_refused(objective: dict[str, Any], words: str, make: Make) -> None:
    with pytest.raises(UserError, match=words):
        train(make(objective=objective))


def test_a_row_for_several_items_is_refused_with_a_dual_encoder(make: Make) -> None:
    with pytest.raises(UserError, match=r"run.packing: true: a dual encoder gets a row for each item"):
        train(make(run={"packing": True}))


def test_steps_without_negatives_are_refused(make: Make) -> None:
    config = make(train={"batch_size": 1, "steps": 1})
    with pytest.raises(UserError, match=r"no step has a negative, so the loss is 0 and nothing is trained"):
        train(config)
    sigmoid = config.objective.model_copy(update={"loss": "sigmoid", "bias": -10.0})
    train(config.model_copy(update={"objective": sigmoid}))


def test_a_last_step_without_a_negative_is_named_at_the_start(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    words = "step 2 of the first epoch has 1 pair and no negative, so its loss is 0"
    train(make(train={"batch_size": 23, "steps": 1}))
    assert words in capsys.readouterr().err
    embedder = load_embedder(make(), Runtime("float32", device="cpu"))
    for size, loss in ((22, "infonce"), (23, "sigmoid")):
        config = make(
            train={"batch_size": size}, objective={"loss": loss, "bias": -10.0 if loss == "sigmoid" else None}
        )
        assert not list(PairDataset(config, embedder, QUIET).notes())


def test_the_start_says_which_embeddings_are_cached(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    line = "embeddings of image items: cached, 2 GiB in memory"
    tune = {"language": {"mode": "full"}}
    config = make(tune=tune, train={"steps": 1})
    train(config)
    assert line in capsys.readouterr().err
    shutil.rmtree(config.run.output_dir)
    train(make(tune=tune, train={"steps": 1}, run={"image_cache": {"memory_gib": 0.0}}))
    assert line not in capsys.readouterr().err


def held_out(make: Make, path: Path) -> tuple[PairDataset, Config]:
    data = {"train": [{"path": str(path)}], "eval": [{"from": "train", "share": 0.3}]}
    config = make(data=data, train={"batch_size": 4, "steps": 2})
    return PairDataset(config, load_embedder(config, Runtime("float32", device="cpu")), QUIET), config


def test_held_out_pairs_have_no_text_and_no_image_of_the_training_pairs(
    make: Make, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each image has two texts; 3 and 4 have one in common, and 5 and 6 are the same image under two names."""
    texts = [[f"text {n}", f"more {n}"] for n in range(12)]
    texts[4][1] = texts[3][0]
    images = [folder / f"{n}.png" for n in range(12)]
    images[6] = folder / "copy.png"
    shutil.copyfile(images[5], images[6])
    lines = [json.dumps({"image": image.name, "text": own}) for image, own in zip(images, texts, strict=True)]
    path = folder / "to_split.jsonl"
    path.write_text("\n".join(lines))
    data, config = held_out(make, path)
    (evaluation,) = data.eval.values()
    sides = [set(one.pairs) for one in (data.train, evaluation.samples)]
    assert sides[0] | sides[1] == set(range(12))
    assert not sides[0] & sides[1]
    assert 0 < len(sides[1]) < 8
    assert any({3, 4} <= side for side in sides)
    assert any({5, 6} <= side for side in sides)
    for samples in (data.train, evaluation.samples):
        keys = {texts[index][0] for index in samples.pairs} | {texts[index][1] for index in samples.pairs}
        num_images = len({images[index].read_bytes() for index in samples.pairs})
        assert len(samples.items) == len(keys) + num_images
        for index, pair in samples.pairs.items():
            assert [samples.items[n].kind for n in pair.numbers] == ["image", "text", "text"]
            span = samples.items[pair.query].encoded.images[0]
            assert Path(str(span.image.source)).read_bytes() == images[index].read_bytes()
    train(config)
    assert f"; {len(sides[1])} pairs held out for evaluation" in capsys.readouterr().err
    assert len(rows(config)) > 2
    path.write_text("\n".join(reversed(lines)))
    again, _ = held_out(make, path)
    assert set(again.train.pairs) == {11 - index for index in sides[0]}


def test_pairs_that_are_all_connected_cannot_be_held_out(make: Make, folder: Path) -> None:
    path = folder / "connected.jsonl"
    path.write_text("".join(json.dumps({"image": f"{n}.png", "text": "a photo"}) + "\n" for n in range(6)))
    with pytest.raises(UserError, match=r"data\.eval: from: train: no pair can be held out"):
        held_out(make, path)


def with_template(config: Config, folder: Path) -> Config:
    """The config with a chat template of its own."""
    given = folder / "given.jinja"
    given.write_text("given " + (TINY / "chat_template.jinja").read_text())
    return config.model_copy(update={"model": config.model.model_copy(update={"chat_template": str(given)})})


def test_a_chat_template_is_for_models_of_chats(make: Make, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.chat_template: a dual encoder has no chats"):
        train(with_template(make(), tmp_path))
    objective = {"scale": 20.0, "pooling": "last"}
    config = pair_config(TINY, folder / "pairs.jsonl", tmp_path / "run", tune={"language": LORA}, objective=objective)
    config = with_template(config, tmp_path)
    embedder = load_embedder(config, Runtime("float32", device="cpu"))
    assert embedder.template == (tmp_path / "given.jinja").read_text()
    (item,) = embedder.encode([(Item("a"), Path())])
    assert not isinstance(item, SampleError)
    assert embedder.processor.tokenizer.decode(item.encoded.ids.tolist()).startswith("given ")
    data = PairDataset(config, embedder, QUIET)
    assert fingerprints(config, data, lambda: None)["model.template"] == sha256(embedder.template.encode()).hexdigest()


@pytest.mark.slow("several runs")
def test_images_stay_where_the_text_has_them(folder: Path, tmp_path: Path) -> None:
    """Two images in one item, one before and one within the text."""
    objective = {"scale": 20.0, "pooling": "last"}
    config = pair_config(TINY, folder / "pairs.jsonl", tmp_path / "run", tune={"language": LORA}, objective=objective)
    embedder = load_embedder(config, Runtime("float32", device="cpu"))
    first, second = Image("0.png"), Image("1.png")
    parts = (first, Text("is like"), second, Text("or not"))
    items = [Item("is likeor not", (first, second), parts=parts), Item("is likeor not", (first, second))]
    encoded = embedder.encode([(item, folder) for item in items])
    texts = [
        re.sub("(<.image_pad.>)+", "@", embedder.processor.tokenizer.decode(one.encoded.ids.tolist()))
        for one in encoded
        if isinstance(one, EncodedItem)
    ]
    assert len(texts) == 2
    kept = [re.sub("<.vision_(start|end).>", "", text) for text in texts]
    assert "@is like@or not" in kept[0]
    assert "@@is likeor not" in kept[1]


@pytest.mark.slow("several runs")
def test_a_vision_language_model_becomes_an_embedder(folder: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {**SMALL, "tune": {"language": LORA}, "objective": {"scale": 20.0, "pooling": "last"}}
    config = pair_config(TINY, folder / "pairs.jsonl", tmp_path / "run", **sections)
    train(config)
    assert all(row["num_pairs"] in (6, 9) for row in rows(config))
    assert any("lora_B" in name and value.any() for name, value in weights(config).items())
    with pytest.raises(UserError, match=r"objective\.pooling: family is for dual encoders"):
        train(
            pair_config(
                TINY, folder / "pairs.jsonl", tmp_path / "other", tune={"language": LORA}, objective={"scale": 20.0}
            )
        )
