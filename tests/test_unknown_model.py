"""A model that mmtrain's tests did not know when it was written: it trains exactly, or one line says why not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmtrain.config.run_section import Run
from mmtrain.config.schema import Config
from mmtrain.encoding.encode import Encoded
from mmtrain.encoding.load import load_processor
from mmtrain.errors import UserError
from mmtrain.progress import QUIET
from mmtrain.runtime.processes import Runtime
from mmtrain.train.dataset import Dataset
from mmtrain.train.learner import make_learner
from mmtrain.train.step import Learner
from support.builders import write_jsonl
from support.family_reference import CASES, as_rows, conversation_of, save_images
from support.learning import ALL_FULL, relative_l2, step_of
from support.unknown_model import PicForAllLogits, PicForConditionalGeneration, make_unknown

TALKS = [conversation_of(case) for case in CASES]
MORE = pytest.mark.slow("more models that nobody knows")


@pytest.fixture
def config(tmp_path: Path) -> Config:
    save_images(tmp_path)
    data = write_jsonl(tmp_path / "talks.jsonl", as_rows(TALKS))
    return Config.model_validate(
        {
            "model": {"path": str(tmp_path / "model"), "dtype": "float32"},
            "tune": ALL_FULL,
            "data": {"train": [{"path": str(data)}]},
            "train": {"steps": 1, "batch_size": len(TALKS)},
            "run": {"output_dir": str(tmp_path / "run")},
        }
    )


def started(config: Config) -> Learner:
    processor = load_processor(config.model.path)
    return make_learner(config, processor, Runtime("float32", device="cpu"), QUIET)


def inputs_of(config: Config, root: Path) -> list[dict[str, Any]]:
    """What the model's own processor makes of each conversation."""
    processor = AutoProcessor.from_pretrained(config.model.path, backend="pil")
    found = []
    for row in as_rows(TALKS):
        for message in row["messages"]:
            for part in message["content"]:
                if part["type"] == "image":
                    part["image"] = str(root / part["image"])
        found.append(
            dict(processor.apply_chat_template(row["messages"], tokenize=True, return_dict=True, return_tensors="pt"))
        )
    return found


def reference(
    config: Config, samples: list[Encoded], inputs: list[dict[str, Any]]
) -> tuple[float, dict[str, torch.Tensor]]:
    """Each conversation alone through the model as transformers loads it, with all logits. Loading makes all weights
    trainable: those that the class does not train are frozen again."""
    model = AutoModelForImageTextToText.from_pretrained(config.model.path, dtype=torch.float32).eval()
    for name, parameter in type(model)(model.config).named_parameters():
        model.get_parameter(name).requires_grad_(parameter.requires_grad)
    total = torch.zeros(())
    for sample, own in zip(samples, inputs, strict=True):
        assert sample.ids.tolist() == own["input_ids"][0].tolist()
        logits = model(**own, use_cache=False).logits[0, :-1]
        targets, supervised = own["input_ids"][0, 1:], torch.tensor(sample.supervised[1:])
        total = total + F.cross_entropy(logits[supervised], targets[supervised], reduction="sum")
    loss = total / sum(sample.num_supervised for sample in samples)
    torch.autograd.backward(loss)
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("variant", "style", "packs"),
    [
        ("plain", "plain", True),
        ("plain", "framed", True),
        pytest.param("plain", "spaced", True, marks=MORE),
        pytest.param("plain", "token first", True, marks=MORE),
        pytest.param("scaled head", "plain", True, marks=MORE),
        ("capped head", "framed", True),
        pytest.param("no positions", "plain", True, marks=MORE),  # only distances count in its attention
        ("fixed shift", "plain", True),  # a parameter that the class itself does not train
        pytest.param("running mean", "plain", False, marks=MORE),
        ("looks back", "plain", False),
        ("neighbours", "plain", False),  # one sample at a time
    ],
)
def test_it_trains_exactly(variant: str, style: str, packs: bool, config: Config, tmp_path: Path) -> None:
    make_unknown(tmp_path / "model", variant, style)
    assert_exact(config, tmp_path, packs)


def assert_exact(config: Config, root: Path, packs: bool) -> None:
    """Loss and gradients are those of the reference, `packs`: in packed rows as well."""
    processor = load_processor(config.model.path)
    dataset = Dataset(config, processor, QUIET)
    learner = started(config)
    assert learner.packing == packs
    used = dataset.checked.used.tolist()
    assert len(used) == len(TALKS)
    samples = [dataset.train.encoded(index) for index in used]
    loss, gradients = reference(config, samples, inputs_of(config, root))
    for packing in {packs, False}:
        found, own = step_of(learner, dataset, [[one] for one in used] if learner.alone else [used], packing)
        assert found == pytest.approx(loss, rel=1e-5)
        assert relative_l2(own, gradients) < 5e-5


@pytest.mark.parametrize(
    ("variant", "style", "reason"),
    [
        ("own positions", "plain", "the positions or token types that mmtrain gives this model change its logits by"),
        ("looks ahead", "plain", "this is not a causal language model: its logits at a token change with the tokens"),
        ("plain", "images first", "the image processor lays out no placeholder '<<pic>>'"),
        ("plain", "adds a word", "the ids of a probe conversation .* differ from the model's own apply_chat_template"),
        ("plain", "no mark", "PicProcessor has no placeholder for an image in its text"),
    ],
)
def test_it_is_refused_in_one_line(variant: str, style: str, reason: str, config: Config, tmp_path: Path) -> None:
    make_unknown(tmp_path / "model", variant, style)
    with pytest.raises(UserError, match=reason) as refused:
        started(config)
    assert len(refused.value.faults) == 1


def test_a_model_that_always_makes_all_logits_trains_exactly(config: Config, tmp_path: Path) -> None:
    make_unknown(tmp_path / "model")
    AutoModelForImageTextToText.register(type_of(config), PicForAllLogits, exist_ok=True)
    try:
        assert_exact(config, tmp_path, packs=True)
    finally:
        AutoModelForImageTextToText.register(type_of(config), PicForConditionalGeneration, exist_ok=True)


def test_a_tokenizer_without_a_padding_token_trains_exactly(config: Config, tmp_path: Path) -> None:
    settings = make_unknown(tmp_path / "model") / "tokenizer_config.json"
    known = json.loads(settings.read_text())
    settings.write_text(json.dumps(known | {"pad_token": None}))
    learner, trained = started(config), Dataset(config, load_processor(config.model.path), QUIET)
    used = trained.checked.used.tolist()
    loss, _ = reference(config, [trained.train.encoded(index) for index in used], inputs_of(config, tmp_path))
    assert step_of(learner, trained, [used], False)[0] == pytest.approx(loss, rel=1e-5)


def test_sharded_weights_of_a_model_that_takes_one_sample_at_a_time_are_refused(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_unknown(tmp_path / "model", "neighbours")
    monkeypatch.setattr(Run, "is_sharded", lambda *_: True)
    with pytest.raises(UserError, match=r"run\.weights: shard .* takes one sample at a time: expected replicate"):
        started(config)


def type_of(config: Config) -> Any:
    from mmtrain.model.load import load_config

    return type(load_config(config.model.path))
