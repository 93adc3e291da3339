"""Whether samples can share a row is found out by a trial on the loaded model, not read from its config."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from mmtrain.config.schema import Config
from mmtrain.encoding.encode import Encoder
from mmtrain.encoding.load import load_processor
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.errors import UserError
from mmtrain.inspect_labels.losses import token_losses
from mmtrain.model import attention
from mmtrain.model import packing_trial as packing
from mmtrain.model.attention import KEYWORD
from mmtrain.model.load import checkpoint_activations, load_model
from mmtrain.model.packing_trial import RowsFound, try_rows
from mmtrain.progress import QUIET, Progress
from mmtrain.records.record_set import RecordSet
from mmtrain.runtime.processes import Runtime
from mmtrain.scoring.packing import RowChoice, choose_rows
from mmtrain.train.dataset import Dataset
from mmtrain.train.learner import make_learner
from mmtrain.train.run import train
from mmtrain.train.step_cuts import StepCuts
from support.attention_models import PRETRAINED, TEXT_MODELS, WINDOW, make_gemma3, make_text_family
from support.builders import MAKERS
from support.fresh_samples import FreshSamples
from support.learning import LORA, learner_for, relative_l2, scores_of, step_of

PACKS = {*MAKERS, "llama", "mixture", "windows"}
LEAKS = {"gpt_oss", "mamba", "lfm2", "qwen3_next", "gemma3"}


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("families")
    made = {name: make_text_family(name, folder / name) for name in TEXT_MODELS}
    return made | {name: make(folder / name) for name, make in {**MAKERS, "gemma3": make_gemma3}.items()}


Load = Callable[..., tuple[Any, ChatProcessor]]


@pytest.fixture
def load(families: dict[str, Path]) -> Load:
    def loaded(name: str, dtype: str = "float32") -> tuple[Any, ChatProcessor]:
        processor = load_processor(str(families[name]))
        return load_model(str(families[name]), dtype, processor), processor

    return loaded


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow("the other type"))])
@pytest.mark.parametrize("name", sorted(PACKS | LEAKS))
def test_the_trial_finds_which_models_can_share_a_row(name: str, dtype: str, load: Load) -> None:
    model, processor = load(name, dtype)
    fault = try_rows(model, processor, getattr(torch, dtype)).fault
    assert (fault is None) == (name in PACKS), fault


@pytest.mark.slow("a model is loaded and tried")
@pytest.mark.parametrize("name", sorted((PACKS | LEAKS) - {"gemma3"}))  # its images are another matter than a leak
def test_the_other_sample_of_a_row_changes_logits_only_where_there_is_a_leak(name: str, load: Load) -> None:
    """However much the model rounds: nothing of the sample itself differs."""
    trial = packing._Trial(*load(name, "bfloat16"), torch.bfloat16)
    leaked = trial.leaked(trial.logits([0, 1], packing=True))
    assert leaked > 0.1 if name in LEAKS else leaked <= (0.01 if name == "mixture" else 0.0)


def test_a_model_that_rounds_as_much_in_padded_rows_can_share_a_row(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large models round more than the tolerance: it is set below what this small one does."""
    model, processor = load("llama", "bfloat16")
    monkeypatch.setitem(packing._TOLERANCE, torch.bfloat16, 0.002)
    assert try_rows(model, processor, torch.bfloat16).fault is None
    monkeypatch.setattr(packing, "_ROUNDING", 0.0)
    assert "each sample alone" in (try_rows(model, processor, torch.bfloat16).fault or "")


@pytest.mark.slow("a model is loaded and tried")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl", "mixture"])
def test_one_token_of_another_sample_is_noticed(
    name: str, dtype: str, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second sample's attention starts at the last token of the first; nothing else is changed."""

    def shifted(batch: Any) -> tuple[int, ...]:
        first, second, *others = (segment.length for segment in batch.segments)
        filling = batch.input_ids.shape[1] - batch.num_tokens
        return (first - 1, second + 1, *others, *([filling] if filling else []))

    monkeypatch.setattr(attention, "_lengths", shifted)
    model, processor = load(name, dtype)
    assert "packed row" in (try_rows(model, processor, getattr(torch, dtype)).fault or "")


def test_a_window_that_is_not_kept_to_in_packed_rows_is_noticed(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples of the trial must be longer than the window for that."""
    causal = attention._causal
    monkeypatch.setattr(attention, "_causal", lambda q, k, v, scaling, window: causal(q, k, v, scaling, None))
    model, processor = load("windows")
    assert model.config.sliding_window == WINDOW
    assert try_rows(model, processor, torch.float32).fault is not None


def test_a_window_too_long_to_try_is_not_taken_on_trust(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    """But where the attention is ours: it looks at one sample at a time."""
    monkeypatch.setattr(packing, "_CPU_MULTIPLICATIONS", 1.0)
    assert "too long to try" in (try_rows(*load("gpt_oss"), torch.float32).fault or "")
    assert try_rows(*load("windows"), torch.float32).fault is None


@pytest.mark.slow("a model is loaded and tried")
@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_layer_that_does_not_pass_the_row_on_is_noticed(name: str, checkpointing: bool, load: Load) -> None:
    """Its attention then sees one long sample."""

    def without_row(module: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return args, {key: value for key, value in kwargs.items() if key != attention.KEYWORD}

    model, processor = load(name)
    if checkpointing:
        checkpoint_activations(model)
    assert try_rows(model, processor, torch.float32).fault is None
    layer = model.get_decoder().layers[-1]
    layer.self_attn.register_forward_pre_hook(without_row, with_kwargs=True)
    assert "in a packed row" in (try_rows(model, processor, torch.float32).fault or "")


def test_a_model_that_refuses_the_keyword_falls_back(load: Load) -> None:
    model, processor = load("llama")
    own = model.forward

    def forward(
        input_ids: Any, use_cache: Any, logits_to_keep: Any, position_ids: Any = None, attention_mask: Any = None
    ) -> Any:
        return own(input_ids, attention_mask, position_ids, use_cache=use_cache, logits_to_keep=logits_to_keep)

    model.forward = forward
    found = try_rows(model, processor, torch.float32).fault or ""
    assert found.startswith("this model cannot run packed rows: TypeError: ")
    assert attention.KEYWORD in found


def test_a_text_model_is_given_no_token_types_where_its_tokenizer_makes_none(load: Load) -> None:
    """GPT-2 and others add the embedding of a token for each type, also of type 0."""
    model, processor = load("llama")
    own = model.forward

    def forward(input_ids: Any, token_type_ids: Any = None, **others: Any) -> Any:
        assert token_type_ids is None
        return own(input_ids, **others)

    model.forward = forward
    assert try_rows(model, processor, torch.float32).fault is None


@pytest.mark.parametrize("packing", [True, False])
def test_samples_that_change_each_other_even_in_padded_rows_go_through_the_model_alone(
    load: Load, packing: bool
) -> None:
    model, processor = load("llama")
    model.get_decoder().layers[0].register_forward_hook(mixed_rows)
    found = try_rows(model, processor, torch.float32, packing)
    assert found.alone
    assert "one sample at a time: in padded rows its logits differ by" in (found.fault or "")


def test_a_model_that_fails_in_rows_of_several_samples_gets_one(load: Load) -> None:
    model, processor = load("llama")
    model.register_forward_pre_hook(lambda module, args, kwargs: _one_row(kwargs["input_ids"]), with_kwargs=True)
    found = try_rows(model, processor, torch.float32)
    assert found == RowsFound("this model takes one sample at a time: padded rows raise ValueError: two rows", True)


def test_a_model_whose_frequencies_change_with_the_longest_sample_gets_one_where_samples_are_long(load: Load) -> None:
    model, processor = load("phi3")
    found = try_rows(model, processor, torch.float32, longest=PRETRAINED)
    assert found == RowsFound()
    found = try_rows(model, processor, torch.float32, longest=4 * PRETRAINED)
    assert found.alone
    assert f"a sample of more than {PRETRAINED} tokens changes" in str(found.fault)


def test_a_long_sample_changes_the_logits_of_another_in_plain_transformers(load: Load) -> None:
    """Which is why the model above gets one sample at a time."""
    ids = torch.arange(PRETRAINED + 1).expand(2, -1) + 1
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    model, _ = load("phi3")
    with torch.no_grad():
        alone, among = model(ids[:1, :20]).logits, model(ids, attention_mask=mask).logits[:1, :20]
        shorter = model(ids[:, :-1], attention_mask=mask[:, :-1]).logits[:1, :20]
    assert torch.allclose(shorter, alone, atol=1e-5)
    assert not torch.allclose(among, alone, atol=1e-2)


def test_logits_that_are_not_finite_are_refused_and_equal_ones_are_no_fault(load: Load) -> None:
    model, processor = load("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
        assert try_rows(model, processor, torch.float32).fault is None
        model.lm_head.weight[7] = float("inf")
        with pytest.raises(UserError, match="not finite"):
            try_rows(model, processor, torch.float32)


def test_a_model_that_fails_in_packed_rows_alone_falls_back(load: Load) -> None:
    def fail(module: Any, args: Any, kwargs: Any) -> None:
        if KEYWORD in kwargs:
            raise TypeError("first line:\nsecond line")

    model, processor = load("llama")
    hook = model.register_forward_pre_hook(fail, with_kwargs=True)
    found = try_rows(model, processor, torch.float32).fault
    assert found == "this model cannot run packed rows: TypeError: first line: second line"
    hook.remove()
    model.register_forward_pre_hook(lambda module, args: 1 / 0)
    with pytest.raises(UserError, match="trial batch: ZeroDivisionError"):
        try_rows(model, processor, torch.float32)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gpt_oss"])
def test_the_trial_leaves_model_and_random_state_as_they_were(name: str, load: Load) -> None:
    model, processor = load(name)
    model.register_forward_pre_hook(lambda module, args: torch.rand(1) and None)  # a model that draws
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    try_rows(model, processor, torch.float32)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())


def mixed_rows(module: Any, args: Any, out: Any) -> Any:
    """Every row gets something of the one before it; a row alone is as it was."""
    return out + 0.1 * (out.roll(1, dims=0) - out)


def _one_row(ids: torch.Tensor) -> None:
    if len(ids) > 1:
        raise ValueError("two rows")


def config_for(path: Path, make_config: Callable[..., Config], **train: Any) -> Config:
    config = make_config("text", {"language": LORA}, **train)
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(path)})})


def test_auto_says_that_it_pads_and_true_is_refused(
    families: dict[str, Path], load: Load, make_config: Callable[..., Config]
) -> None:
    model, processor = load("gpt_oss")
    runtime, lines = Runtime("float32"), list[str]()

    def choose(**train: Any) -> RowChoice:
        config = config_for(families["gpt_oss"], make_config, **train)
        return choose_rows(model, processor, config, runtime, lines.append)

    assert choose() == RowChoice(packing=False, alone=False)
    assert [line.startswith("packing: off, in a packed row the logits of this model differ by") for line in lines] == [
        True
    ]
    assert choose(packing="auto").packing is False
    assert choose(packing=False).packing is False
    assert len(lines) == 2
    with pytest.raises(UserError, match=r"run\.packing: in a packed row"):
        choose(packing=True)


def test_auto_and_true_pack_where_it_is_proven(load: Load, make_config: Callable[..., Config]) -> None:
    model, processor = load("text")
    runtime, lines = Runtime("float32"), list[str]()
    for wanted, expected in (("auto", True), (True, True), (False, False)):
        config = make_config("text", packing=wanted)
        assert choose_rows(model, processor, config, runtime, lines.append) == RowChoice(expected, alone=False)
    assert not lines


def test_a_model_that_leaks_is_trained_in_padded_rows(
    families: dict[str, Path], make_config: Callable[..., Config], tmp_path: Path
) -> None:
    """Law 1 for such a model: the step of `auto` is that of samples one by one."""
    learner, dataset = learner_for(config_for(families["gpt_oss"], make_config))
    assert learner.packing is False
    together = step_of(learner, dataset, [[0, 1, 2, 3, 4, 5, 6, 7]], learner.packing)
    alone = step_of(learner, dataset, [[n] for n in range(8)], False)
    assert together[0] == pytest.approx(alone[0], rel=1e-5)
    assert relative_l2(together[1], alone[1]) < 1e-5
    leaking = step_of(learner, dataset, [[0, 1, 2, 3, 4, 5, 6, 7]], True)
    assert abs(leaking[0] - alone[0]) > 1e-3  # what it is all about


def test_a_model_whose_rows_affect_each_other_is_trained_one_sample_at_a_time(
    make_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    def load_mixed() -> Any:
        model = load_model(config.model.path, "float32", processor)
        model.get_decoder().layers[0].register_forward_hook(mixed_rows)
        return model

    config = make_config("text", {"language": LORA})
    processor = load_processor(config.model.path)
    dataset = Dataset(config, processor, QUIET)
    learner = make_learner(config, processor, Runtime("float32"), Progress(), load_mixed)
    assert capsys.readouterr().err.count("packing: off, this model takes one sample at a time") == 1
    cuts = StepCuts(dataset, learner, config.run).of_all(1)
    assert [len(cut) for cut in cuts] == [1] * len(dataset.plan.step(1))


@pytest.mark.slow("several commands")
def test_the_other_commands_decide_alike(
    families: dict[str, Path], make_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    def nll(**settings: Any) -> Any:
        config = config_for(families["gpt_oss"], make_config, **settings)
        return scores_of(config, data=[config.data.train[0].path]).nll

    def losses(**settings: Any) -> Any:
        config = config_for(families["gpt_oss"], make_config, **settings)
        processor = load_processor(config.model.path)
        samples = FreshSamples(RecordSet(config.data.train), Encoder(processor))
        return token_losses(config, None, samples, processor, [0, 1])

    for command in (nll, losses):
        found, line = command(), capsys.readouterr().err
        assert line.count("packing: off, ") == 1
        assert np.array_equal(found, command(packing=False)) if command is nll else found == command(packing=False)
        assert "packing" not in capsys.readouterr().err
        with pytest.raises(UserError, match=r"run\.packing"):
            command(packing=True)


@pytest.mark.slow("several runs")
def test_a_run_records_what_was_asked_and_resumes(
    families: dict[str, Path], make_config: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_for(families["gpt_oss"], make_config, steps=1)
    output = Path(config.run.output_dir)
    train(config)
    assert capsys.readouterr().err.count("packing: off, ") == 1
    assert yaml.safe_load((output / "config.yaml").read_text())["run"]["packing"] == "auto"
    train(config.model_copy(update={"train": config.train.model_copy(update={"steps": 2})}), accept=["train.steps"])
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow("steps of another kind of model")
def test_the_trial_changes_no_first_weight_and_nothing_drawn_later(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("qwen2_5_vl")
    weights = []
    for skipped in (False, True):
        with monkeypatch.context() as patch:
            if skipped:
                patch.setattr("mmtrain.train.learner.choose_rows", lambda *args: RowChoice(packing=True, alone=False))
            learner = make_learner(config, load_processor(config.model.path), Runtime("float32"), QUIET)
        weights.append({name: p.detach().clone() for name, p in learner.model.named_parameters()})
        weights[-1]["next"] = torch.rand(4)
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
