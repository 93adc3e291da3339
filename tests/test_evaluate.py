"""eval perplexity against plain forwards with full logits, over cuts, and with images changed."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer
from typer.testing import CliRunner

from mmtrain.cli import app
from mmtrain.config import dump_config
from mmtrain.config.schema import Config
from mmtrain.encoding.encode import Encoder
from mmtrain.encoding.images import decode
from mmtrain.encoding.load import load_processor
from mmtrain.errors import UserError
from mmtrain.evaluate.evaluation import ModelScoring
from mmtrain.model.load import load_model
from mmtrain.records.record_set import RecordSet
from mmtrain.scoring.changed_images import ChangedImages
from mmtrain.train.run import train
from support.builders import SHAPES, TINY, write_jsonl
from support.fresh_samples import FreshSamples
from support.learning import LORA, scores_of

MakeConfig = Callable[..., Config]
MORE_CUTS = [(1, True), (4096, True), (1, False), (150, False)]


def with_eval(config: Config, *paths: str) -> Config:
    sources = [{"path": path} for path in paths or [config.data.train[0].path]]
    return Config.model_validate(config.model_dump() | {"data": config.data.model_dump() | {"eval": sources}})


def plain_sums(config: Config) -> dict[int, tuple[float, int, int]]:
    """Sample → sum of nll, supervised tokens, right ones: one sample at a time, full logits, shifted, float32."""
    processor = load_processor(config.model.path)
    samples = FreshSamples(RecordSet(config.data.eval), Encoder(processor))
    model = load_model(config.model.path, "float32", processor)
    found = {}
    for number in range(len(samples)):
        encoded = samples.encoded(number)
        ids = torch.tensor(encoded.ids, dtype=torch.long)[None]
        decoded = [decode(span.image) for span in encoded.images]
        inputs: dict[str, Any] = processor.image_inputs([decoded])[0] if decoded else {}
        if "image_grid_thw" in inputs:
            inputs["mm_token_type_ids"] = torch.eq(ids, torch.tensor(processor.image_token_id)).int()
        with torch.no_grad():
            logits = model(input_ids=ids, **inputs).logits[0, :-1].float()
        labels = torch.where(torch.tensor(encoded.supervised), ids[0], -100)[1:]
        nll = F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
        right = int((logits.argmax(-1) == labels).sum())
        found[number] = (nll, int((labels >= 0).sum()), right)
    return found


@pytest.mark.parametrize(
    ("microbatch_tokens", "packing"),
    [(150, True), (4096, False), *(pytest.param(*one, marks=pytest.mark.slow("more cuts")) for one in MORE_CUTS)],
)
def test_scores_equal_plain_forwards_whatever_the_cut(
    kind: str, packing: bool, microbatch_tokens: int, make_config: MakeConfig
) -> None:
    config = with_eval(make_config(kind, packing=packing, microbatch_tokens=microbatch_tokens))
    scores, expected = scores_of(config), plain_sums(config)
    assert set(scores.sample.tolist()) == expected.keys()
    for number, (nll, tokens, right) in expected.items():
        own = scores.of(scores.sample[scores.sample == number])
        assert own.nll.sum() == pytest.approx(nll, rel=1e-5)
        assert (own.num_supervised.sum(), own.num_right.sum()) == (tokens, right)


def test_answers_are_distinguished_with_their_bytes(make_config: MakeConfig) -> None:
    scores = scores_of(with_eval(make_config("qwen2_5_vl")))
    sixth = scores.of(scores.sample[scores.sample == 6])
    assert sixth.answer.tolist() == [1, 2, 3]
    words = ["1", "2", "It is three, and more than three: 3333"]
    assert sixth.num_bytes.tolist() == [len(text.encode()) for text in words]
    assert sixth.num_supervised.tolist()[:2] == [2, 2]  # the digit and the end of the turn
    assert scores.has_image.tolist() == [n not in (1, 4) for n in scores.sample.tolist()]


def run(config: Config, tmp_path: Path, *words: str) -> Any:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    result = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1"}).invoke(app, ["eval", "perplexity", str(path), *words])
    if result.exception is not None:
        raise result.exception
    return json.loads(result.stdout) if "--json" in words else result.stdout


def test_a_model_with_uniform_output_has_the_perplexity_of_its_vocabulary(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = with_eval(make_config("text"))
    processor = load_processor(config.model.path)
    model = load_model(config.model.path, "float32", processor)
    model.lm_head.weight.data.zero_()
    model.save_pretrained(tmp_path / "uniform")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "uniform" / name).write_bytes((Path(config.model.path) / name).read_bytes())
    uniform = Config.model_validate(config.model_dump() | {"model": {"path": str(tmp_path / "uniform")}})
    row = run(uniform, tmp_path, "--json", "model.dtype=float32")
    vocabulary = model.get_input_embeddings().num_embeddings
    assert row["nll"] == pytest.approx(math.log(vocabulary), rel=1e-6)
    assert row["perplexity"] == pytest.approx(vocabulary, rel=1e-5)
    promised = {"perplexity", "nll", "num_supervised", "num_samples", "bits_per_byte", "token_accuracy", "interval"}
    assert promised | {"sources", "turns", "images"} <= row.keys()
    assert run(uniform, tmp_path, "model.dtype=float32")


def shapes_rows(number: int) -> list[dict[str, Any]]:
    """Open questions of held-out images, by their absolute places."""
    rows = json.loads((SHAPES / "test.json").read_text())
    return [row for row in rows if row["conversations"][1]["value"] not in ("yes", "no")][:number]


@pytest.mark.slow("trains and evaluates the tiny model")
def test_what_the_images_are_worth(make_config: MakeConfig, tmp_path: Path) -> None:
    """The shipped model looks; the same with its projector's output at zero cannot."""
    data = tmp_path / "open.json"
    data.write_text(json.dumps(shapes_rows(120)))
    config = make_config("qwen2_5_vl", packing=False)
    sections = config.model_dump()
    sections["model"]["path"] = str(TINY)
    sections["data"]["eval"] = [{"path": str(data), "root": str(SHAPES)}]
    seeing = run(Config.model_validate(sections), tmp_path, "--json", "--images", "all")["images"]
    assert seeing["swapped"]["interval"][0] > 0.5
    assert seeing["grey"]["interval"][0] > 0.5
    assert "ignores the images" not in seeing["verdict"]
    assert (seeing["swapped"]["num_samples"], seeing["swapped"]["num_left_out"]) == (120, 0)

    processor = load_processor(str(TINY))
    model = load_model(str(TINY), "float32", processor)
    for parameter in model.model.visual.merger.mlp[-1].parameters():
        parameter.data.zero_()
    model.save_pretrained(tmp_path / "blind")
    for path in TINY.iterdir():
        if path.suffix != ".safetensors" and path.name != "config.json":
            (tmp_path / "blind" / path.name).write_bytes(path.read_bytes())
    sections["model"]["path"] = str(tmp_path / "blind")
    blind = run(Config.model_validate(sections), tmp_path, "--json", "--images", "all")["images"]
    low, high = blind["swapped"]["interval"]
    assert low <= 1e-6
    assert high >= -1e-6
    assert "ignores the images" in blind["verdict"]


def test_swapped_images_are_never_the_sample_s_own(make_config: MakeConfig) -> None:
    config = with_eval(make_config("qwen2_5_vl"))
    samples = ModelScoring(config).eval_samples
    changed = ChangedImages(samples.samples, samples.encoder, "swapped", samples.indices)
    assert changed.indices is not None
    assert set(changed.indices.tolist()) == {0, 2, 3, 5, 6, 7}
    for number in changed.indices.tolist():
        own = {image.name for image in samples.samples.records.conversation(number).images}
        shown = [span.image.name for span in changed.encoded(number).images]
        assert not own & set(shown)
        assert len(shown) == len(samples.samples.records.conversation(number).images)
    none = ChangedImages(samples.samples, samples.encoder, "none", samples.indices)
    assert not none.encoded(3).images
    grey = ChangedImages(samples.samples, samples.encoder, "grey", samples.indices).encoded(3)
    assert [span.image.size for span in grey.images] == [(50, 120), (64, 64)]
    assert {decode(span.image).getpixel((1, 1)) for span in grey.images} == {(128, 128, 128)}


@pytest.mark.slow("trains and evaluates")
def test_compare_gives_paired_differences(make_config: MakeConfig, tmp_path: Path) -> None:
    config = with_eval(make_config("text", {"language": LORA}, steps=8, batch_size=8, learning_rate=0.02))
    train(config)
    adapter = str(Path(config.run.output_dir) / "adapter")
    base, tuned, again = run(config, tmp_path, "--json", "--compare", "base", adapter, "base")
    assert base["difference"] is None
    assert tuned["difference"]["nats_per_token"] == pytest.approx(tuned["nll"] - base["nll"], rel=1e-9)
    assert tuned["difference"]["interval"][1] < 0
    assert again["difference"]["nats_per_token"] == 0
    rows = [json.loads(line) for line in (Path(config.run.output_dir) / "metrics.jsonl").read_text().splitlines()]
    evals = [row for row in rows if "eval" in row]
    assert evals[0]["nll"] == pytest.approx(base["nll"], rel=1e-6)
    assert evals[-1]["nll"] == pytest.approx(tuned["nll"], rel=1e-5)
    alone = run(config, tmp_path, "--json", "--adapter", adapter)
    assert alone["nll"] == pytest.approx(tuned["nll"], rel=1e-6)
    assert run(config, tmp_path, "--compare", "base", adapter)


def test_nothing_supervised_is_an_error(make_config: MakeConfig, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "train": False}]
    data = write_jsonl(tmp_path / "none.jsonl", [{"messages": turns}])
    with pytest.raises(UserError, match="no assistant turn to train on"):
        run(make_config("text"), tmp_path, "--data", str(data))
    with pytest.raises(UserError, match="there are no sources"):
        run(make_config("text"), tmp_path)


def test_what_is_dropped_is_named(make_config: MakeConfig, tmp_path: Path) -> None:
    config = with_eval(make_config("text"))
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    chats = [json.loads(line)["messages"] for line in Path(config.data.train[0].path).read_text().splitlines()]
    lengths = [len(tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)) for chat in chats]
    row = run(config, tmp_path, "--json", "data.max_length=60", "data.too_long=drop")
    too_long = [f"mixed.jsonl:{line}" for line, length in enumerate(lengths, start=1) if length > 60]
    assert 0 < len(too_long) < 8
    assert [Path(entry["place"]).name for entry in row["dropped"]] == too_long
    assert row["num_samples"] == 8 - len(too_long)
    assert all("over the 60 allowed" in entry["reason"] for entry in row["dropped"])
