"""mmtrain merge: one model with the logits and the greedy tokens of base + adapter, or nothing at all."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, Qwen3ForCausalLM
from typer.testing import CliRunner

from mmtrain.cli import app
from mmtrain.config.schema import Config
from mmtrain.encoding.encode import Encoder
from mmtrain.encoding.images import decode
from mmtrain.encoding.load import load_processor
from mmtrain.errors import StorageError, UserError
from mmtrain.merge import command, stored
from mmtrain.merge.command import merge
from mmtrain.merge.source import find_source
from mmtrain.model import weight_files
from mmtrain.model.weight_files import save_weights
from mmtrain.records.record_set import RecordSet
from mmtrain.train.run import train
from support.builders import copy_text_tokenizer, randomized
from support.learning import ALL_FULL, LORA, MIXED

MakeConfig = Callable[..., Config]
DORA = {"mode": "lora", "rank": 2, "variant": "dora"}
TUNES: list[tuple[str, dict[str, Any]]] = [
    ("text", {"language": LORA}),
    ("qwen2_5_vl", MIXED),
    ("llava", {"vision": DORA, "language": DORA, "projector": {"mode": "full"}}),
]


def trained(config: Config) -> Path:
    train(config)
    return Path(config.run.output_dir)


def load(kind: str, path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """As a user loads it, in plain transformers."""
    auto = AutoModelForCausalLM if kind == "text" else AutoModelForImageTextToText
    return auto.from_pretrained(path, dtype=dtype).eval()


def sample_inputs(config: Config) -> tuple[Tensor, dict[str, Any]]:
    """The ids of the first sample, and its image tensors, as training has them."""
    processor = load_processor(config.model.path)
    records = RecordSet(config.data.train)
    encoded = Encoder(processor).encode(records.conversation(0), records.roots(0))
    ids = torch.tensor(encoded.ids, dtype=torch.long)[None]
    images = [decode(span.image) for span in encoded.images]
    inputs = processor.image_inputs([images])[0] if images else {}
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = torch.eq(ids, torch.tensor(processor.image_token_id)).int()
    return ids, inputs


@torch.no_grad()
def logits_of(model: Any, config: Config) -> Tensor:
    ids, inputs = sample_inputs(config)
    logits: Tensor = model(input_ids=ids, **inputs).logits.float()
    return logits


def greedy(model: Any, config: Config, num: int = 8) -> list[int]:
    """The most likely tokens after the sample, by plain forwards over all tokens so far."""
    ids, inputs = sample_inputs(config)
    found: list[int] = []
    for _ in range(num):
        if "mm_token_type_ids" in inputs:
            missing = ids.shape[1] - inputs["mm_token_type_ids"].shape[1]
            inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, missing))
        with torch.no_grad():
            token = model(input_ids=ids, **inputs).logits[0, -1].argmax()
        found.append(int(token))
        ids = torch.cat([ids, token[None, None]], dim=1)
    return found


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.slow("a model is merged")
@pytest.mark.parametrize(
    ("kind", "tune"),
    [
        pytest.param(kind, tune, marks=() if kind == "qwen2_5_vl" else pytest.mark.slow("other kinds of models"))
        for kind, tune in TUNES
    ],
)
def test_the_merged_model_is_base_and_adapter_in_plain_transformers(
    kind: str, tune: dict[str, Any], make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(kind, tune, steps=3)
    run, output = trained(config), tmp_path / "new" / "merged"
    result = CliRunner().invoke(app, ["merge", str(run), "-o", str(output)])
    assert result.exit_code == 0, result.exception
    assert "on 4 samples of the run its logits differ" in result.stderr
    base = Path(config.model.path)
    both = PeftModel.from_pretrained(load(kind, base), str(run / "adapter")).eval()
    merged, expected = load(kind, output), logits_of(both, config)
    assert relative(logits_of(merged, config), expected) < 1e-5
    assert relative(logits_of(load(kind, base), config), expected) > 1e-3
    assert greedy(merged, config) == greedy(both, config)
    assert {path.name for path in base.iterdir()} <= {path.name for path in output.iterdir()} - {"README.md"}
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (output / name).read_bytes() == (base / name).read_bytes()
    assert "perplexity" not in (output / "README.md").read_text()  # the run had no data.eval
    assert "- trained on: mixed.jsonl" in (output / "README.md").read_text()
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.slow("trains and merges a model")
def test_the_base_model_of_a_run_is_found_from_another_directory(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("text", steps=1)
    (tmp_path / "base").symlink_to(config.model.path)
    monkeypatch.chdir(tmp_path)
    run = trained(config.model_copy(update={"model": config.model.model_copy(update={"path": "base"})}))
    monkeypatch.chdir("/")
    assert Path(find_source(run, None).path).samefile(config.model.path)


@pytest.mark.slow("a model is merged")
def test_weights_are_cast_once_to_the_type_of_the_base_model(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("qwen2_5_vl", MIXED, steps=3)
    run = trained(config)
    base = tmp_path / "half"
    load("qwen2_5_vl", Path(config.model.path), torch.bfloat16).save_pretrained(base)
    for path in Path(config.model.path).iterdir():
        if not (base / path.name).exists():
            (base / path.name).write_bytes(path.read_bytes())
    merge(run, tmp_path / "merged", str(base))
    settings = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert {settings["dtype"], settings["text_config"]["dtype"], settings["vision_config"]["dtype"]} == {"bfloat16"}
    both = PeftModel.from_pretrained(load("qwen2_5_vl", base), str(run / "adapter")).merge_and_unload()
    found = load("qwen2_5_vl", tmp_path / "merged", torch.bfloat16).state_dict()
    expected = both.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name].bfloat16()) for name, value in found.items())


def tied_run(make_config: MakeConfig, folder: Path) -> tuple[Config, Path]:
    """A run with LoRA on a head that is tied to the embeddings."""
    config = make_config("text", {"language": {**LORA, "targets": ["lm_head", "q_proj"]}}, steps=3)
    settings = AutoConfig.from_pretrained(config.model.path)
    settings.tie_word_embeddings = True
    path = randomized(Qwen3ForCausalLM(settings), folder / "tied")
    copy_text_tokenizer(path)
    config = Config.model_validate(config.model_dump() | {"model": {"path": str(path), "dtype": "float32"}})
    return config, trained(config)


@pytest.mark.slow("trains and merges a model")
@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")
def test_an_adapter_on_a_tied_head_gets_a_head_of_its_own(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = tied_run(make_config, tmp_path)
    merge(run, tmp_path / "merged")
    assert "lm_head shares its weight with another layer" in capsys.readouterr().err
    both = PeftModel.from_pretrained(load("text", Path(config.model.path)), str(run / "adapter")).eval()
    merged = load("text", tmp_path / "merged")
    assert relative(logits_of(merged, config), logits_of(both, config)) < 1e-5
    assert merged.config.tie_word_embeddings is False
    assert torch.equal(merged.get_input_embeddings().weight, both.get_input_embeddings().weight)


@pytest.mark.slow("trains and merges a model")
@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")
def test_a_wrong_merge_is_refused_and_leaves_nothing(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run = tied_run(make_config, tmp_path)
    monkeypatch.setattr(command, "untie", lambda model: [])
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"logits differ by .* from those of base \+ adapter"):
        merge(run, tmp_path / "merged")
    assert sorted(tmp_path.iterdir()) == before


def test_a_weight_that_is_not_written_as_merged_is_noticed(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(make_config("text", steps=1))

    def damaged(model: Any, folder: Path) -> None:
        weight = model.model.norm.weight
        kept = weight.detach().clone()
        weight.data[0] += 1e-6
        save_weights(model, folder)
        weight.data.copy_(kept)

    monkeypatch.setattr(stored, "save_weights", damaged)
    with pytest.raises(UserError, match=r"1 weights are not the merged ones, such as 'model\.norm\.weight'"):
        merge(run, tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))


@pytest.mark.slow("trains and merges a model")
def test_large_models_are_saved_in_several_files(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("llava", {"language": LORA}, steps=1)
    run = trained(config)
    monkeypatch.setattr(weight_files, "MAX_SHARD", "200KB")
    merge(run, tmp_path / "merged")
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) >= 2
    assert not (tmp_path / "merged" / "model.safetensors").exists()
    both = PeftModel.from_pretrained(load("llava", Path(config.model.path)), str(run / "adapter")).eval()
    assert relative(logits_of(load("llava", tmp_path / "merged"), config), logits_of(both, config)) < 1e-5


@pytest.mark.slow("trains and merges a model")
def test_an_adapter_without_its_run_is_merged_too(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config("llava", {"vision": LORA, "language": LORA}, steps=1)
    adapter = (trained(config) / "adapter").rename(tmp_path / "alone")
    merge(adapter, tmp_path / "merged", config.model.path)
    assert "the logits are compared on random samples" in capsys.readouterr().err
    both = PeftModel.from_pretrained(load("llava", Path(config.model.path)), str(adapter)).eval()
    assert relative(logits_of(load("llava", tmp_path / "merged"), config), logits_of(both, config)) < 1e-5


@pytest.mark.slow("trains and merges a model")
def test_data_that_has_moved_is_reported(
    make_config: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config("text", steps=1)
    run = trained(config)
    Path(config.data.train[0].path).unlink()
    merge(run, tmp_path / "merged")
    shown = capsys.readouterr().err
    assert "the run's samples cannot be used (" in shown
    assert "mixed.jsonl" in shown


def test_what_cannot_be_merged_is_refused(
    make_config: MakeConfig, tmp_path: Path, model_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(make_config("text", steps=1))
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there: it exists: give a new directory with -o"):
        merge(run, tmp_path / "there")
    with pytest.raises(UserError, match="no adapter there"):
        merge(tmp_path, tmp_path / "merged")
    with pytest.raises(UserError, match=r"with the chat template .*/adapter/chat_template\.jinja: .* no placeholder"):
        merge(run, tmp_path / "merged", str(model_dirs["llava"]))
    quantized = tmp_path / "quantized"
    quantized.mkdir()
    settings = json.loads((model_dirs["text"] / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantized / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="its weights are quantized"):
        merge(run, tmp_path / "merged", str(quantized))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(StorageError, match=r"merged: it needs [\d.]+ MB, 0\.0 MB are free: free space"):
        merge(run, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_complete_model_needs_no_merge(make_config: MakeConfig, tmp_path: Path) -> None:
    run = trained(make_config("text", {"language": ALL_FULL["language"]}, steps=1))
    with pytest.raises(UserError, match="a complete model was trained, there is nothing to merge"):
        merge(run, tmp_path / "merged")


@pytest.mark.slow("trains and merges a model")
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "text"])
def test_an_adapter_of_a_quantized_base_is_merged_into_the_dequantized_one(
    kind: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    data = make_config(kind, {"language": LORA}, steps=3).model_dump()
    data["model"]["quantization"] = "nf4"
    config = Config.model_validate(data)
    run = trained(config)
    merge(run, tmp_path / "merged")
    settings = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in settings
    code = re.findall(r"```python\n(.*?)```", (run / "adapter" / "README.md").read_text(), re.DOTALL)[0]
    names: dict[str, Any] = {}
    exec(code.replace('folder = "."', f"folder = {str(run / 'adapter')!r}"), names)  # quantized, as in training
    for module in names["model"].modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # its inference format computes in bfloat16
            module.support_avx512bf16_for_cpu = False
    merged = logits_of(load(kind, tmp_path / "merged"), config)
    assert relative(merged, logits_of(names["model"], config)) < 1e-5
    original = PeftModel.from_pretrained(load(kind, Path(config.model.path)), str(run / "adapter")).eval()
    assert relative(merged, logits_of(original, config)) > 1e-3
