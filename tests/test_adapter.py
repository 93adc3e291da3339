"""Adapters: what peft makes of them is what is loaded, and whatever does not fit or is not safe is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mmtrain.errors import UserError
from mmtrain.model.adapter import load_adapter, read_adapter

PROJECTIONS = ["q_proj", "v_proj", "down_proj"]
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def base_model(model_dirs: dict[str, Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_dirs["text"], dtype=torch.float32).eval()


def make_adapter(folder: Path, model: Any, **settings: Any) -> Path:
    """An adapter with random weights, saved by peft."""
    config = LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": PROJECTIONS, "r": 4, **settings})
    peft_model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    peft_model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


@pytest.fixture(scope="module")
def saved(model_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter") / "adapter", base_model(model_dirs))


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    """A copy to be spoiled."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "r": 8},
    "dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["up_proj"]},
    "layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded": {"exclude_modules": ["v_proj"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "patterns": {
        "target_modules": r"^(?:model\.layers\.0\.mlp\.up_proj|model\.layers\.1\.self_attn\.q_proj)$",
        "rank_pattern": {r"^(?:model\.layers\.0\.mlp\.up_proj)$": 2},
        "alpha_pattern": {"q_proj": 3.0},
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_adapter_computes_what_it_does_in_peft(variant: str, model_dirs: dict[str, Path], tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", base_model(model_dirs), **VARIANTS[variant])
    expected = logits(PeftModel.from_pretrained(base_model(model_dirs), folder))
    model = base_model(model_dirs)
    before = logits(model)
    found = load_adapter(model, read_adapter(folder))
    assert torch.equal(logits(found), expected)
    assert not torch.equal(expected, before)
    assert not any(parameter.requires_grad for name, parameter in found.named_parameters() if "lora_" in name)


def test_adapters_are_loaded_next_to_each_other(model_dirs: dict[str, Path], saved: Path, tmp_path: Path) -> None:
    other = make_adapter(tmp_path / "other", base_model(model_dirs), r=2, target_modules=["k_proj"])
    model = base_model(model_dirs)
    base = logits(model)
    for name, folder in (("one", saved), ("two", other), ("three", saved)):
        model = load_adapter(model, read_adapter(folder), name)
        assert torch.equal(logits(model), logits(PeftModel.from_pretrained(base_model(model_dirs), folder)))
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


def test_the_directory_of_a_run_means_its_adapter(saved: Path) -> None:
    assert read_adapter(saved.parent).folder == read_adapter(saved).folder == saved


@pytest.mark.parametrize("name", ["", "no-such", "owner/name", "x" * 300, "a\nb"])
def test_a_directory_without_an_adapter_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_refused(lambda: read_adapter(name), "no adapter there, neither adapter_config.json nor adapter/adapter_")


def check_refused(load: Callable[[], object], reason: str) -> None:
    with pytest.raises(UserError) as refused:
        load()
    (fault,) = refused.value.faults
    assert reason in fault
    assert fault.isprintable()
    assert len(fault) < 1000


CONFIG_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "ia3": ({"peft_type": "IA3"}, "peft_type: expected 'LORA', not 'IA3'"),
    "prompt": ({"peft_type": "PROMPT_TUNING"}, "peft_type: expected 'LORA'"),
    "list for a type": ({"peft_type": ["LORA"]}, "peft_type: expected 'LORA'"),
    "no type": ({"peft_type": None}, "peft_type: expected 'LORA'"),
    "task": ({"task_type": "SEQ_CLS"}, "task_type: expected 'CAUSAL_LM'"),
    "unknown": ({"surprise": 1}, "'surprise' is not supported, but is set to '1'"),
    "code": ({"auto_mapping": {"base_model_class": "X", "parent_library": "os"}}, "'auto_mapping' is not supported"),
    "base changed": ({"init_lora_weights": "pissa"}, "init_lora_weights: expected True"),
    "layers copied": ({"layer_replication": [[0, 2], [0, 2]]}, "'layer_replication' is not supported"),
    "bias": ({"bias": "all"}, "'bias' is not supported, but is set to 'all'"),
    "lora bias": ({"lora_bias": True}, "'lora_bias' is not supported"),
    "rank as text": ({"r": "4"}, "r: expected a valid integer, not '4'"),
    "no rank": ({"r": 0}, "r: expected greater than 0, not '0'"),
    "true for a rank": ({"r": True}, "r: expected a valid integer"),
    "huge rank": ({"r": 10**12}, "r or rank_pattern is 1000000000000, but the rank of the weights is at most 4"),
    "huge rank in a pattern": ({"rank_pattern": {"q_proj": 10**9}}, "r or rank_pattern is 1000000000, but"),
    "other rank": ({"r": 2}, "size mismatch"),
    "alpha": ({"lora_alpha": float("nan")}, "lora_alpha: expected a finite number"),
    "targets": ({"target_modules": 3}, "target_modules: expected"),
    "no targets": ({"target_modules": None}, "target_modules: expected"),
    "other targets": ({"target_modules": ["nothing"]}, "does not fit the model"),
    "regex": ({"target_modules": r"(a+)+$"}, "target_modules: expected a list of module names, or a pattern"),
    "regex in a list": ({"target_modules": ["q_proj", "(a+)+$"]}, "target_modules: expected a list of module names"),
    "regex in the pattern": ({"target_modules": r"^(?:(a+)+)$"}, "target_modules: expected"),
    "wildcard in the pattern": ({"target_modules": r"^(?:a.*b)$"}, "target_modules: expected"),
    "regex to exclude": ({"exclude_modules": r"(a+)+$"}, "exclude_modules: expected"),
    "regex for ranks": ({"rank_pattern": {"(a+)+$": 4}}, "rank_pattern: expected module names as keys, not"),
    "regex for alphas": ({"alpha_pattern": {"(a+)+$": 4.0}}, "alpha_pattern: expected module names as keys"),
    "regex for layers": ({"layers_to_transform": [0], "layers_pattern": "(a+)+"}, "layers_pattern: expected plain"),
    "regex to save": ({"modules_to_save": ["(a+)+"]}, "modules_to_save: expected plain module names"),
    "ranks": ({"rank_pattern": {"q_proj": "4"}}, "rank_pattern: expected a valid integer"),
    "layers": ({"layers_to_transform": "all"}, "layers_to_transform: expected a valid"),
    "nothing saved in full": ({"modules_to_save": ["up_proj"]}, "up_proj.weight' is missing"),
    "a list saved in full": ({"modules_to_save": ["layers"]}, "does not fit the model"),
}


@pytest.mark.parametrize("case", CONFIG_FAULTS)
def test_a_faulty_config_is_refused(case: str, adapter: Path, model_dirs: dict[str, Path]) -> None:
    changes, reason = CONFIG_FAULTS[case]
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    check_refused(lambda: load_adapter(base_model(model_dirs), read_adapter(adapter)), reason)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "adapter_config.json: not JSON"),
        (b"{", "adapter_config.json: not JSON"),
        (b"\xff\xfe\x00", "adapter_config.json: not JSON"),
        (b"[" * 100_000, "adapter_config.json: not JSON"),
        (b"9" * 10_000, "adapter_config.json: not JSON"),
        (b"[]", "expected an object of keys, not '[]'"),
        (b'"LORA"', "expected an object of keys"),
        (b"{}", "peft_type: required, but missing"),
        (b'{"peft_type": "LORA"}', "r: required, but missing"),
    ],
)
def test_a_config_that_is_not_one_is_refused(content: bytes, reason: str, adapter: Path) -> None:
    (adapter / "adapter_config.json").write_bytes(content)
    check_refused(lambda: read_adapter(adapter), reason)


def test_keys_without_a_value_of_other_versions_of_peft_are_no_fault(adapter: Path, saved: Path) -> None:
    file = adapter / "adapter_config.json"
    changes = {"a_later_feature": None, "another": False, "base_model_name_or_path": "elsewhere/model"}
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert read_adapter(adapter).config == read_adapter(saved).config


def without_one(weights: dict[str, Tensor]) -> None:
    del weights[FIRST]


def with_another(weights: dict[str, Tensor]) -> None:
    weights[FIRST.replace("layers.0", "layers.7")] = weights[FIRST].clone()


def of_another_model(weights: dict[str, Tensor]) -> None:
    for key in list(weights):
        weights[key.replace(".layers.", ".blocks.")] = weights.pop(key)


def with_a_base_weight(weights: dict[str, Tensor]) -> None:
    weights["base_model.model.model.norm.weight"] = torch.zeros(64)


def with_another_shape(weights: dict[str, Tensor]) -> None:
    weights[FIRST] = torch.zeros(4, 63)


def with_nan(weights: dict[str, Tensor]) -> None:
    weights[FIRST][1, 2] = float("nan")


def with_integers(weights: dict[str, Tensor]) -> None:
    weights[FIRST] = weights[FIRST].to(torch.int32)


def with_nothing(weights: dict[str, Tensor]) -> None:
    weights.clear()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (without_one, "1 of 12 tensors are missing, such as 'base_model.model.model.layers.0.self_attn.q_proj.lora_A"),
        (
            with_another,
            "1 of 13 tensors have no place in the model's adapter, such as 'base_model.model.model.layers.7",
        ),
        (of_another_model, "12 of 12 tensors have no place in the model's adapter, such as 'base_model.model.model.b"),
        (with_a_base_weight, "1 of 13 tensors have no place in the model's adapter, such as 'base_model.model.model.n"),
        (with_another_shape, "size mismatch for base_model.model.model.layers.0.self_attn.q_proj.lora_A"),
        (with_nan, f"{FIRST}' is not finite"),
        (with_integers, f"{FIRST}' is torch.int32"),
        (with_nothing, "it has no weights"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    spoil: Callable[[dict[str, Tensor]], None], reason: str, adapter: Path, model_dirs: dict[str, Path]
) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    spoil(weights)
    save_file(weights, adapter / "adapter_model.safetensors")
    check_refused(lambda: load_adapter(base_model(model_dirs), read_adapter(adapter)), reason)


def test_half_a_weights_file_is_refused(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    for content in (b"", whole[:7], whole[:100], whole[: len(whole) // 2], whole[:-1], b"\xff" * 8 + whole[8:]):
        file.write_bytes(content)
        check_refused(lambda: read_adapter(adapter), "adapter_model.safetensors: not a complete safetensors file")


def test_pickled_weights_are_refused(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    check_refused(lambda: read_adapter(adapter), "adapter_model.safetensors: not there")
    (adapter / "adapter_model.bin").write_bytes(b"anything")
    check_refused(lambda: read_adapter(adapter), "only adapter_model.bin, a pickle, which may run code")
