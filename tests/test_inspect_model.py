"""What `mmtrain inspect-model` says of a model, against the model and processor of transformers."""

import json
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlavaForConditionalGeneration,
)

from mmtrain import cli
from mmtrain.encoding.load import load_processor
from mmtrain.encoding.processor import EncodingTrial
from mmtrain.inspect_model.command import lines
from mmtrain.inspect_model.find import ModelFound, find
from mmtrain.inspect_model.trainable_components import ComponentFound
from mmtrain.model.family import probe_family
from mmtrain.model.load import load_model
from support.builders import TINY
from support.families_grid import GRID
from support.families_text import TEXT_ONLY
from support.families_tile import TILE
from support.family_models import make_family

MADE = {**GRID, **TILE, **TEXT_ONLY}
INSIDE = {
    "qwen2_5_vl": {"projector": "model.visual.merger.", "vision": "model.visual."},
    "llava": {"projector": "model.multi_modal_projector.", "vision": "model.vision_tower."},
    "idefics3": {"projector": "model.connector.", "vision": "model.vision_model."},
    "text": {},
}
"""Where the parameters of a component are, the first that fits; all others are the language model's."""


@pytest.fixture(scope="module")
def directories(model_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inspected")
    names = ("idefics3", "gemma3", "falcon_mamba", "llava_next")
    return {"tiny": TINY, **model_dirs} | {name: make_family(MADE[name], folder / name) for name in names}


@pytest.fixture(scope="module")
def found(directories: dict[str, Path]) -> dict[str, ModelFound]:
    def quiet(line: str) -> None:
        assert line.startswith("head: ")

    return {name: find(str(path), quiet) for name, path in directories.items()}


def component(found: ModelFound, name: str) -> ComponentFound:
    (only,) = (one for one in found.components if one.name == name)
    return only


@pytest.mark.slow("models of several families")
@pytest.mark.parametrize("name", INSIDE)
def test_parameters_and_adapters_are_counted_by_component(
    name: str, directories: dict[str, Path], found: dict[str, ModelFound]
) -> None:
    auto = AutoModelForCausalLM if name == "text" else AutoModelForImageTextToText
    model = auto.from_pretrained(directories[name])

    def component_of(inner: str) -> str:
        return next((part for part, prefix in INSIDE[name].items() if inner.startswith(prefix)), "language")

    linear = [n for n, module in model.named_modules() if type(module) is nn.Linear and n != "lm_head"]
    bare = {n: p.numel() for n, p in model.named_parameters() if n.rpartition(".")[0] not in linear}
    for part in {component_of(n) for n, _ in model.named_parameters()}:
        one = component(found[name], part)
        assert one.num_parameters == sum(p.numel() for n, p in model.named_parameters() if component_of(n) == part)
        assert one.num_adapted == sum(component_of(f"{n}.weight") == part for n in linear)
        assert one.num_without_adapter == sum(size for n, size in bare.items() if component_of(n) == part)
    assert found[name].model_class == type(model).__name__
    assert len(found[name].components) == len(INSIDE[name]) + 1


@pytest.mark.slow("a model is loaded and tried")
def test_the_tokens_of_an_image_are_those_of_the_image_processor(
    directories: dict[str, Path], found: dict[str, ModelFound]
) -> None:
    own = AutoImageProcessor.from_pretrained(directories["qwen2_5_vl"], backend="pil")
    images = found["qwen2_5_vl"].images
    assert images is not None
    assert images.num_tokens.keys() == {"336x336", "1000x1000"}
    for size, count in images.num_tokens.items():
        width, height = map(int, size.split("x"))
        assert count == own.get_number_of_image_patches(height, width, {}) // own.merge_size**2
    tiled = found["idefics3"].images
    assert tiled is not None
    assert all(tiled.num_placeholders[size] < int(count) for size, count in tiled.num_tokens.items())


@pytest.mark.slow("models of several families")
@pytest.mark.parametrize(
    ("name", "part", "way", "reason"),
    [
        ("tiny", "vision", "full next to lora", None),
        ("tiny", "language", "full next to lora", "would untie the model's tied embeddings"),
        ("llava_next", "language", "full next to lora", "model has weights of its own next to other components"),
        ("falcon_mamba", "language", "lora", None),
        ("falcon_mamba", "language", "full", None),
        ("gemma3", "projector", "lora", "no layer gets LoRA by default"),
    ],
)
def test_the_ways_to_train_a_component_are_tried(
    name: str, part: str, way: str, reason: str | None, found: dict[str, ModelFound]
) -> None:
    refused = component(found[name], part).modes[way]
    assert (refused is None) == (reason is None), refused
    assert re.search(reason or "", refused or "")


@pytest.mark.slow("a model is loaded and tried")
@pytest.mark.parametrize(
    ("name", "fault"),
    [("tiny", None), ("llava", None), ("gemma3", "in a packed row"), ("falcon_mamba", "in a packed row")],
)
def test_packing_is_tried(name: str, fault: str | None, found: dict[str, ModelFound]) -> None:
    assert (found[name].packing is None) == (fault is None)
    assert (fault or "") in (found[name].packing or "")


@pytest.mark.slow("a model is loaded and tried")
def test_the_image_cache_is_tried(
    directories: dict[str, Path], found: dict[str, ModelFound], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert found["tiny"].image_cache is None
    assert found["text"].image_cache == "this model takes no images"

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no such thing")

    monkeypatch.setattr(LlavaForConditionalGeneration, "get_image_features", broken)
    assert find(str(directories["llava"]), print).image_cache == "its trial failed with RuntimeError: no such thing"


def test_what_the_template_takes_and_writes(found: dict[str, ModelFound]) -> None:
    tiny, mamba, gemma = (found[name].template for name in ("tiny", "falcon_mamba", "gemma3"))
    assert (tiny.text_roles, tiny.takes_system, tiny.added_end) == ([], True, None)
    assert (tiny.generation_prompt, tiny.reply_end) == ("<|im_start|>assistant\n", "<|im_end|>")
    assert mamba.text_roles == ["assistant", "system", "tool", "user"]
    assert (mamba.reply_end, mamba.added_end) == (None, MADE["falcon_mamba"].eos)
    assert gemma.reply_end in MADE["gemma3"].stops


PATCHES = {"tiny": 4, "llava": 1, "idefics3": 4, "gemma3": 4, "text": 1}
"""Patches that become one token, from the configs: 2 x 2 are merged; none; 2 x 2 shuffled; 4 x 4 pooled to 4 tokens."""


@pytest.mark.slow("a model is loaded and tried")
@pytest.mark.parametrize("name", PATCHES)
def test_patches_per_token_are_measured(name: str, directories: dict[str, Path]) -> None:
    processor = load_processor(str(directories[name]))
    family = probe_family(load_model(str(directories[name]), "float32", processor), processor, print)
    assert family.patches_per_token == PATCHES[name]
    assert family.grid_key == ("image_grid_thw" if name == "tiny" else None)


EVERY_PROBE = [
    *("no image", "no image and two replies", "one image", "one image and two replies", "two images"),
    *("two images and two replies", "images within the text", "a system turn"),
]


def test_what_the_ids_were_compared_on_is_shown(found: dict[str, ModelFound]) -> None:
    for name in ("tiny", "llava", "idefics3"):
        assert found[name].encoding == EncodingTrial(EVERY_PROBE, [], {})
    assert found["text"].encoding == EncodingTrial(["no image", "no image and two replies", "a system turn"], [], {})
    shown = " ".join("\n".join(lines(found["tiny"])).split())
    assert f"ids equal the model's own with {', '.join(EVERY_PROBE)}" in shown
    assert "packing on: packed rows equal samples alone image cache on: cached features equal pixels" in shown


@pytest.mark.slow("a model is loaded and tried")
def test_the_end_of_a_reply_that_follows_its_prompt_is_shown(tmp_path: Path) -> None:
    path = make_family(MADE["llava_onevision"], tmp_path / "model")
    found = find(str(path), lambda line: None)
    assert found.template.reply_end == "<|im_end|>"
    assert found.encoding == EncodingTrial([], EVERY_PROBE, {})


@pytest.mark.slow("a model is loaded and tried")
def test_the_lines_fit_the_terminal_and_json_says_the_same(
    found: dict[str, ModelFound], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for one in found.values():
        assert max(map(len, lines(one))) <= 80
    shown = "\n".join(lines(found["gemma3"]))
    assert re.search(r"^packing +off, in a packed row", shown, re.MULTILINE)
    assert "tune.projector: frozen, full, full next to lora" in shown
    monkeypatch.setattr(sys, "argv", ["mmtrain", "inspect-model", str(TINY), "--json"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code
    assert json.loads(capsys.readouterr().out) == asdict(found["tiny"])


def without_template(folder: Path) -> Path:
    shutil.copytree(TINY, folder)
    (folder / "chat_template.jinja").unlink()
    return folder


@pytest.mark.parametrize("what", ["no directory", "no template"])
def test_what_cannot_be_inspected_is_one_line_and_exit_code_2(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = without_template(tmp_path / "model") if what == "no template" else tmp_path / "nowhere"
    monkeypatch.setattr(sys, "argv", ["mmtrain", "inspect-model", str(path)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert left.value.code == 2
    assert str(path) in line
    reason = "give one as model.chat_template: FILE" if what == "no template" else "there is no such directory"
    assert reason in line
