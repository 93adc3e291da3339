"""Divergence, entropy and calibration against direct formulas in float64, and `eval perplexity --compare` against plain
forwards."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from mmtrain.cli import app
from mmtrain.config import dump_config
from mmtrain.config.schema import Config
from mmtrain.encoding.encode import Encoder
from mmtrain.encoding.load import load_processor
from mmtrain.errors import UserError
from mmtrain.evaluate import models
from mmtrain.evaluate.evaluation import ModelScoring
from mmtrain.progress import Progress
from mmtrain.records.record_set import RecordSet
from mmtrain.runtime.processes import Runtime
from mmtrain.scoring import distributions
from mmtrain.scoring.distributions import calibration, calibration_figures, divergence, entropy, token_columns
from mmtrain.train.run import train
from support.fresh_samples import FreshSamples
from support.learning import LORA

MakeConfig = Callable[..., Config]


def logits(scale: float, n: int = 50, vocabulary: int = 300) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(int(scale * 10))
    first, noise = (torch.randn(n, vocabulary, generator=generator, dtype=torch.float64) for _ in range(2))
    return first * scale, (first + 0.3 * noise) * scale


def direct(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """KL and the first's entropy as their definitions say, in float64, with 0 log 0 = 0."""
    p, q = first.double().softmax(-1), second.double().softmax(-1)
    log_q = second.double().log_softmax(-1)
    log_p = torch.where(p > 0, p.log(), torch.zeros_like(p))
    return torch.where(p > 0, p * (log_p - log_q), q * 0).sum(-1), -(p * log_p).sum(-1)


@pytest.mark.parametrize("scale", [0.01, 1.0, 5.0, 40.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_divergence_and_entropy_equal_the_definitions(scale: float, dtype: torch.dtype) -> None:
    first, second = (one.to(dtype) for one in logits(scale))
    expected_kl, expected_entropy = direct(first, second)
    log_p, log_q = (one.float().log_softmax(-1) for one in (first, second))
    torch.testing.assert_close(divergence(log_p, log_q).double(), expected_kl, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(entropy(log_p).double(), expected_entropy, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_a_thousand_are_no_trouble(dtype: torch.dtype) -> None:
    first = torch.tensor([[1000.0, -1000, 0], [1000, 1000, -1000], [-1000, -1000, -1000]], dtype=dtype)
    second = torch.tensor([[-1000.0, 1000, 0], [1000, -1000, 1000], [-1000, -1000, -1000]], dtype=dtype)
    log_p, log_q = (one.float().log_softmax(-1) for one in (first, second))
    # 1: certain, and the other one gives it e^-2000; 2: two halves, one of which the other gives e^-2000 / 2
    expected = [2000.0, 0.5 * (0 + 2000), 0.0]
    torch.testing.assert_close(divergence(log_p, log_q), torch.tensor(expected), rtol=1e-6, atol=0)
    torch.testing.assert_close(entropy(log_p), torch.tensor([0.0, math.log(2), math.log(3)]), rtol=1e-6, atol=1e-7)
    assert token_columns(first, second, torch.zeros(3, dtype=torch.long)).isfinite().all()


def test_tokens_without_probability_add_nothing_or_make_it_infinite() -> None:
    inf = torch.inf
    half, one, all_ = (torch.tensor([row]).log() for row in ([0.5, 0.5, 0], [1.0, 0, 0], [0.25, 0.5, 0.25]))
    assert divergence(one, half).item() == pytest.approx(math.log(2), rel=1e-6)
    assert divergence(half, all_).item() == pytest.approx(0.5 * math.log(2), rel=1e-6)
    assert divergence(half, one).item() == inf
    tiny = torch.tensor([[0.0, -1000, -inf]])  # a probability that is 0 in float32, and yet not excluded
    assert divergence(tiny, one.log_softmax(-1)).item() == inf
    assert divergence(one, tiny).item() == 0
    assert divergence(half, half).item() == 0
    assert entropy(half).item() == pytest.approx(math.log(2), rel=1e-6)


def test_the_divergence_of_nearly_equal_distributions_is_not_rounding() -> None:
    """The sum of p log(p / q) in float32 is off by 1e-7 and can be negative; the terms used here cannot."""
    first, _ = logits(2.0)
    second = first + 1e-4 * torch.randn(first.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected, _ = direct(first, second)
    log_p = first.float().log_softmax(-1)
    d = (second - first - ((second - first).exp() * first.softmax(-1)).sum(-1, keepdim=True).log()).float()
    found = divergence(log_p, log_p + d)
    assert (found >= 0).all()
    assert float(expected.max()) < 1e-8
    assert float((found.double() - expected).abs().max()) < 1e-8
    assert (divergence(log_p, log_p) == 0).all()


def test_calibration_by_hand() -> None:
    log_p = torch.tensor([[0.95, 0.05], [0.93, 0.07], [0.6, 0.4], [1.0, 0.0]]).log()
    bins = calibration(log_p, torch.tensor([0, 1, 1, 0])).sum(0).double().numpy()
    found = calibration_figures(bins)
    assert found["expected_accuracy"] == pytest.approx((0.95 + 0.93 + 0.6 + 1) / 4)
    assert found["observed_accuracy"] == 0.5
    # the bin from 0.9 has three tokens of 2.88 in all and 2 right; the one from 0.6 has 0.6 and none
    assert found["expected_calibration_error"] == pytest.approx((abs(2 - 2.88) + 0.6) / 4)
    last = found["bins"][-1]
    assert (last["range"], last["num_tokens"]) == ([0.9, 1.0], 3)
    assert (last["confidence"], last["accuracy"]) == (pytest.approx(0.96), pytest.approx(2 / 3))
    assert len(found["bins"]) == 2


def run(config: Config, tmp_path: Path, *words: str) -> Any:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    result = CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1"}).invoke(app, ["eval", "perplexity", str(path), *words])
    if result.exception is not None:
        raise result.exception
    return json.loads(result.stdout) if "--json" in words else result.stdout


def with_eval(config: Config) -> Config:
    data = config.model_dump()
    data["data"]["eval"] = [{"path": config.data.train[0].path}]
    return Config.model_validate(data)


def plain_logits(model: Any, config: Config) -> tuple[Tensor, Tensor]:
    """(num_supervised, vocabulary) logits before every supervised token of the evaluation samples, and their ids."""
    samples = FreshSamples(RecordSet(config.data.eval), Encoder(load_processor(config.model.path)))
    found, targets = [], []
    for number in range(len(samples)):
        encoded = samples.encoded(number)
        ids, supervised = torch.tensor(encoded.ids, dtype=torch.long), torch.tensor(encoded.supervised)
        with torch.no_grad():
            found.append(model(input_ids=ids[None]).logits[0, :-1][supervised[1:]])
        targets.append(ids[supervised])
    return torch.cat(found), torch.cat(targets)


@pytest.mark.parametrize(
    "head",
    ["frozen", *(pytest.param(head, marks=pytest.mark.slow("trains again")) for head in ("adapted", "complete"))],
)
def test_compare_equals_plain_forwards(
    head: str, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an adapter, with an adapter on the head too, and with a complete model that was trained."""
    tune = {
        "frozen": LORA,
        "adapted": LORA | {"targets": ["q_proj", "lm_head"]},
        "complete": {"mode": "full"},
    }[head]
    config = with_eval(make_config("text", {"language": tune}, steps=6, learning_rate=0.02))
    monkeypatch.setattr(distributions, "_VALUES_AT_ONCE", 1280 * 7)  # blocks of seven tokens
    train(config)
    folder = Path(config.run.output_dir)
    base = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32).eval()
    first, targets = plain_logits(base, config)
    if head == "complete":
        tuned = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    else:
        tuned = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
    second, _ = plain_logits(tuned, config)
    expected, entropy_of_base = direct(first, second)
    assert float(expected.mean()) > 0.01
    own, other = run(config, tmp_path, "--json", "--compare", "base", str(folder))
    assert own["divergence"] is None
    assert other["divergence"]["mean"] == pytest.approx(float(expected.mean()), rel=1e-4)
    low, high = other["divergence"]["interval"]
    assert low < other["divergence"]["mean"] < high
    assert own["entropy"]["mean"] == pytest.approx(float(entropy_of_base.mean()), rel=1e-5)
    assert other["entropy"]["mean"] == pytest.approx(float(direct(second, first)[1].mean()), rel=1e-5)
    for row, plain in ((own, first), (other, second)):
        p, right = plain.double().softmax(-1).max(-1).values, plain.argmax(-1) == targets
        assert row["calibration"]["expected_accuracy"] == pytest.approx(float(p.mean()), rel=1e-5)
        assert row["calibration"]["observed_accuracy"] == pytest.approx(float(right.double().mean()), rel=1e-9)
        assert row["calibration"]["observed_accuracy"] == pytest.approx(row["token_accuracy"], rel=1e-9)
        cells = np.digitize(p.numpy(), np.arange(1, 10) / 10)
        gaps = [abs(float((right.double() - p)[cells == cell].sum())) for cell in range(10)]
        assert row["calibration"]["expected_calibration_error"] == pytest.approx(sum(gaps) / len(p), rel=1e-5)


@pytest.mark.slow("several runs")
def test_the_report_has_a_plot(make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = with_eval(make_config("text", {"language": LORA}, steps=4, learning_rate=0.02))
    train(config)
    monkeypatch.chdir(Path(config.run.output_dir).parent)
    text = run(config, tmp_path, "--compare", "base", "run")
    assert re.search(r"^model +KL +entropy +expected +observed +error$", text, re.MULTILINE)
    assert re.search(r"^run +\d\.\d{4} +\d\.\d{4} +[\d.]+% +[\d.]+% +[\d.]+%$", text, re.MULTILINE)
    assert re.search(r"^  0\.0 to 0\.1 [█│ ]{40} +[\d.]+%  \d+ tokens$", text, re.MULTILINE)
    assert all(len(line) <= 80 for line in text.splitlines())
    (alone,) = run(config, tmp_path, "--json", "--compare", "base")
    assert alone["divergence"] is None
    assert alone["entropy"]["mean"] > 0


@pytest.mark.slow("trains twice and compares three times")
def test_adapters_take_turns(make_config: MakeConfig, tmp_path: Path) -> None:
    """Three models in one process, each with its own figures whichever was loaded last."""
    runs = []
    for number, seed in enumerate((1, 2)):
        config = with_eval(
            make_config("llava", {"vision": LORA, "language": LORA}, steps=3, seed=seed, learning_rate=0.02)
        )
        data = config.model_dump()
        data["run"]["output_dir"] = str(tmp_path / f"run-{number}")
        train(Config.model_validate(data))
        runs.append(data["run"]["output_dir"])
    rows = run(config, tmp_path, "--json", "--compare", runs[0], runs[1], "base")
    alone = run(config, tmp_path, "--json", "--compare", runs[0], "base")
    again = run(config, tmp_path, "--json", "--compare", runs[0], runs[1])
    assert rows[2]["divergence"]["mean"] == pytest.approx(alone[1]["divergence"]["mean"], rel=1e-5)
    assert rows[1]["divergence"]["mean"] == pytest.approx(again[1]["divergence"]["mean"], rel=1e-5)
    assert rows[1]["divergence"]["mean"] > 1e-4


def test_a_complete_model_with_other_tokens_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    config = with_eval(make_config("text", {"language": {"mode": "full"}}, steps=1))
    train(config)
    template = Path(config.run.output_dir) / "model" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    with pytest.raises(UserError, match="it has other tokenizer or processor files than"):
        ModelScoring(config, adapters=[config.run.output_dir])


def test_a_complete_model_is_not_quantized_as_the_base_model_is(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config("text", {"language": LORA})
    model = config.model.model_copy(update={"quantization": "nf4"})
    config = config.model_copy(update={"model": model})
    made: list[Config] = []
    monkeypatch.setattr(models, "AdaptedModels", lambda own, *others: made.append(own))
    found = models.FoundModels({}, {"run": tmp_path / "run" / "model"})
    processor: Any = None
    models.ComparedModels(config, found, processor, Runtime("float32", device="cpu"), Progress())
    assert [own.model.quantization for own in made] == ["nf4", None]
    assert made[1].model.path == str(tmp_path / "run" / "model")
    assert (
        "run was saved whole: it is loaded without model.quantization, the base model with it"
        in capsys.readouterr().err
    )
