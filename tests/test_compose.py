"""mmtrain compose: both models unchanged, a new projector, and one model that plain transformers loads."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
)
from typer.testing import CliRunner

from mmtrain.cli import app
from mmtrain.compose.command import ComposeOptions, compose
from mmtrain.compose.language import Language, with_image_tokens
from mmtrain.config import load_config
from mmtrain.config.schema import Config
from mmtrain.encoding.load import load_processor
from mmtrain.errors import UserError
from mmtrain.merge.command import merge
from mmtrain.model import weight_files
from mmtrain.train.run import train
from support.builders import DECODER_SIZES, ROOT, copy_text_tokenizer, make_text, mixed_rows, randomized, write_jsonl
from support.families_more import MORE
from support.families_tile import TILE
from support.family_models import make_family
from support.towers import (
    SIDE,
    SIZE,
    TOWERS,
    WIDTH,
    make_any_resolution,
    make_convnet,
    make_registers,
)

COMBINATIONS = [*((tower, "mlp2x-gelu") for tower in TOWERS), ("siglip", "linear"), ("dinov2", "pixel-shuffle")]
TEXT_WIDTH = 64


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("parts")
    return {name: make(folder / name) for name, make in {**TOWERS, "language": make_text}.items()}


@pytest.fixture(scope="module")
def compose_once(parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The composed model of a tower and a projector, made once."""
    folder = tmp_path_factory.mktemp("composed")

    def made(tower: str, projector: Any) -> Path:
        output = folder / f"{tower}-{projector}"
        if not output.exists():
            compose(ComposeOptions(str(parts[tower]), str(parts["language"]), output, projector))
        return output

    return made


def weights_in(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.slow("models are composed")
@pytest.mark.parametrize(("tower", "projector"), COMBINATIONS)
def test_every_weight_of_both_parts_is_carried_over_to_the_bit(
    tower: str, projector: str, parts: dict[str, Path], compose_once: Callable[[str, str], Path]
) -> None:
    found = weights_in(compose_once(tower, projector))
    vision, language = weights_in(parts[tower]), weights_in(parts["language"])
    if "logit_scale" in vision:  # of two encoders; the one of text is left out
        vision = {name: value for name, value in vision.items() if name.startswith("vision_model.")}
    expected = {f"vision_tower.{name.removeprefix('vision_model.')}": value for name, value in vision.items()}
    expected |= {f"language_model.{name}": value for name, value in language.items()}
    assert len(expected) >= 40
    for name, value in expected.items():
        rows = found[name][: len(value)] if name.endswith(("embed_tokens.weight", "lm_head.weight")) else found[name]
        assert rows.dtype == value.dtype
        assert torch.equal(rows, value), name
    new = {name for name in found if name not in expected}
    assert new
    assert all(name.startswith("multi_modal_projector.") for name in new)


def shuffled(features: Tensor) -> Tensor:
    """(1, side * side, width) → (1, side * side / 4, 4 * width): each square of 2 x 2 neighbours is one vector."""
    grid = features.reshape(SIDE // 2, 2, SIDE // 2, 2, WIDTH)  # row, row inside, column, column inside
    return grid.permute(0, 2, 1, 3, 4).reshape(1, (SIDE // 2) ** 2, 4 * WIDTH)


def hand_wired(folder: Path, tower: Path, language: Path, projector: str, ids: Tensor, pixels: Tensor) -> Tensor:
    """Logits by the two parts alone: tower → projector → the places of the image tokens → language model."""
    new, prefix = weights_in(folder), "multi_modal_projector."
    vision = AutoModel.from_pretrained(tower, dtype=torch.float32).eval()
    vision = getattr(vision, "vision_model", vision)
    features = vision(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    features = features[:, features.shape[1] - SIDE**2 :]
    if projector == "pixel-shuffle":
        features = shuffled(features)
        norm = (new[f"{prefix}layernorm.weight"], new[f"{prefix}layernorm.bias"])
        features = torch.nn.functional.layer_norm(features, features.shape[-1:], *norm, eps=1e-6)
    hidden = features @ new[f"{prefix}linear_1.weight"].T + new[f"{prefix}linear_1.bias"]
    if projector == "mlp2x-gelu":
        hidden = torch.nn.functional.gelu(hidden)
    if projector == "pixel-shuffle":
        hidden, gate = hidden.chunk(2, dim=-1)
        hidden = torch.nn.functional.silu(gate) * hidden
    hidden = hidden @ new[f"{prefix}linear_2.weight"].T + new[f"{prefix}linear_2.bias"]
    model = AutoModelForCausalLM.from_pretrained(language, dtype=torch.float32).eval()
    place = json.loads((folder / "config.json").read_text())["image_token_index"]
    embeddings = new["language_model.model.embed_tokens.weight"][ids[0]].clone()
    embeddings[ids[0] == place] = hidden[0]
    out = model.model(inputs_embeds=embeddings[None]).last_hidden_state
    logits: Tensor = out @ new["language_model.lm_head.weight"].T
    return logits


@pytest.mark.slow("models are composed")
@pytest.mark.parametrize(("tower", "projector"), COMBINATIONS)
@torch.no_grad()
def test_the_forward_is_the_hand_wired_one(
    tower: str, projector: str, parts: dict[str, Path], compose_once: Callable[[str, str], Path]
) -> None:
    folder = compose_once(tower, projector)
    processor = load_processor(str(folder))
    inputs, span = processor.image_inputs([[PIL.Image.radial_gradient("L").convert("RGB").resize((50, 40))]])
    ids = torch.tensor([[5, 6, 7, *span, 8, 9]])
    composed = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    found = composed(input_ids=ids, **inputs).logits
    pixels = inputs["pixel_values"]
    expected = hand_wired(folder, parts[tower], parts["language"], projector, ids, pixels)
    assert float((found - expected).norm() / expected.norm()) < 1e-6
    without = composed(input_ids=ids, **{**inputs, "pixel_values": pixels + 1}).logits
    assert float((found - without).norm() / expected.norm()) > 1e-4  # the image matters


PLAIN = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mmtrain": raise ImportError("mmtrain is blocked")
sys.meta_path.insert(0, Blocked())
import PIL.Image
from transformers import AutoModelForImageTextToText, AutoProcessor
for path in sys.argv[1:]:
    model = AutoModelForImageTextToText.from_pretrained(path).eval()
    processor = AutoProcessor.from_pretrained(path)
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=[PIL.Image.new("RGB", (50, 40), "red")], text=text, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    placeholder = model.config.image_token_id
    print("GENERATED", out.shape[1] - inputs["input_ids"].shape[1], int((inputs["input_ids"] == placeholder).sum()))
"""


@pytest.mark.slow("a model is composed, loaded and asked")
def test_plain_transformers_loads_it_and_generates(compose_once: Callable[[str, str], Path], tmp_path: Path) -> None:
    num_tokens = {"mlp2x-gelu": SIDE**2, "pixel-shuffle": SIDE**2 // 4}
    code = [sys.executable, "-c", PLAIN, *(str(compose_once("siglip", projector)) for projector in num_tokens)]
    done = subprocess.run(code, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"GENERATED (\d+) (\d+)\n", done.stdout) == [("4", str(num)) for num in num_tokens.values()]


def test_the_template_is_the_language_model_s_own(
    parts: dict[str, Path], compose_once: Callable[[str, str], Path]
) -> None:
    own, composed = (
        AutoTokenizer.from_pretrained(path) for path in (parts["language"], compose_once("clip", "mlp2x-gelu"))
    )
    texts = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "  What?\n"},
        {"role": "assistant", "content": "That."},
    ]

    def rendered(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    expected = rendered(own, texts)
    as_parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in texts]
    assert rendered(composed, texts) == rendered(composed, as_parts) == expected
    as_parts[1]["content"] = [{"type": "image"}, *as_parts[1]["content"], {"type": "image"}]
    assert rendered(composed, as_parts) == expected.replace("  What?\n", "<image>\n  What?\n<image>\n")
    with pytest.raises(Exception, match="only text and images are supported, not video"):
        rendered(composed, [{"role": "user", "content": [{"type": "video"}]}])


@pytest.mark.slow("a model is composed, loaded and asked")
def test_the_new_weights_follow_from_the_seed(parts: dict[str, Path], tmp_path: Path) -> None:
    made = {}
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        compose(ComposeOptions(str(parts["dinov2"]), str(parts["language"]), tmp_path / name, seed=seed))
        made[name] = weights_in(tmp_path / name)
    for name, value in made["one"].items():
        assert torch.equal(value, made["two"][name])
    row = "language_model.model.embed_tokens.weight"
    assert not torch.equal(made["one"][row][-1], made["other"][row][-1])
    projector = "multi_modal_projector.linear_2.weight"
    assert not torch.equal(made["one"][projector], made["other"][projector])


def test_a_linear_projector_starts_as_one_linear_map(compose_once: Callable[[str, str], Path]) -> None:
    found = weights_in(compose_once("clip", "linear"))
    assert torch.equal(found["multi_modal_projector.linear_2.weight"], torch.eye(TEXT_WIDTH))
    assert not found["multi_modal_projector.linear_2.bias"].any()


def test_unused_rows_of_the_embeddings_are_taken_first(parts: dict[str, Path], tmp_path: Path) -> None:
    """Many models have more embeddings than tokens: such a row is used as it is."""
    model = AutoModelForCausalLM.from_pretrained(parts["language"])
    torch.manual_seed(1)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    copy_text_tokenizer(tmp_path / "language")
    model.save_pretrained(tmp_path / "language")
    compose(ComposeOptions(str(parts["clip"]), str(tmp_path / "language"), tmp_path / "made"))
    found, expected = weights_in(tmp_path / "made"), weights_in(tmp_path / "language")
    name = "model.embed_tokens.weight"
    assert torch.equal(found[f"language_model.{name}"], expected[name])


def test_the_type_of_the_parts_is_kept_or_chosen(parts: dict[str, Path], tmp_path: Path) -> None:
    half = tmp_path / "half"
    copy_text_tokenizer(half)
    AutoModelForCausalLM.from_pretrained(parts["language"], dtype=torch.bfloat16).save_pretrained(half)
    with pytest.raises(UserError) as caught:
        compose(ComposeOptions(str(parts["clip"]), str(half), tmp_path / "made"))
    assert str(caught.value) == (
        f"--vision {parts['clip']} is stored in float32, --language {half} is stored in bfloat16: expected one type; "
        "choose the type of the composed model with --dtype"
    )
    compose(ComposeOptions(str(parts["clip"]), str(half), tmp_path / "made", dtype="bfloat16"))
    found = weights_in(tmp_path / "made")
    assert {value.dtype for value in found.values()} == {torch.bfloat16}
    original = weights_in(half)
    assert torch.equal(found["language_model.model.norm.weight"], original["model.norm.weight"])
    assert json.loads((tmp_path / "made" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_large_model_is_stored_in_several_files(
    parts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_files, "MAX_SHARD", "300KB")
    compose(ComposeOptions(str(parts["clip"]), str(parts["language"]), tmp_path / "made"))
    index = json.loads((tmp_path / "made" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) >= 2
    load_processor(str(tmp_path / "made"))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (make_registers, r"gives features of shape \(21, 32\) for 16 patches: expected one vector for each"),
        (make_any_resolution, "does not encode an image from its pixels alone"),
        (make_convnet, "expected one vector for each"),
        (partial(make_family, TILE["aya_vision"]), r"\(5, 3, 28, 28\): expected square patches in one square image"),
        (
            partial(make_family, MORE["janus"]),
            "transformers has no LlavaForConditionalGeneration with JanusVisionModel",
        ),
    ],
)
def test_a_tower_without_a_vector_for_each_patch_is_refused(
    make: Callable[[Path], Path], reason: str, parts: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        compose(ComposeOptions(str(make(tmp_path / "tower")), str(parts["language"]), tmp_path / "made"))
    assert len(caught.value.faults) == 1
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "made").exists()


def test_what_does_not_fit_is_refused(parts: dict[str, Path], tmp_path: Path, model_dirs: dict[str, Path]) -> None:
    vision, language, output = str(parts["clip"]), str(parts["language"]), tmp_path / "made"
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there: it exists: give a new directory with -o"):
        compose(ComposeOptions(vision, language, tmp_path / "there"))
    with pytest.raises(UserError, match="this model takes images already: give a causal language model"):
        compose(ComposeOptions(vision, str(model_dirs["llava"]), output))
    with pytest.raises(UserError, match=r"--feature-layer 4: .*: expected -4 to 3"):
        compose(ComposeOptions(vision, language, output, feature_layer=4))
    bare = tmp_path / "bare"
    copy_text_tokenizer(bare)
    (bare / "chat_template.jinja").unlink()
    AutoModelForCausalLM.from_pretrained(language).save_pretrained(bare)
    with pytest.raises(UserError, match="the model has no chat template"):
        compose(ComposeOptions(vision, str(bare), output))
    assert not output.exists()


def test_logits_that_are_changed_after_the_head_are_refused(parts: dict[str, Path], tmp_path: Path) -> None:
    """Gemma 2 caps them, which the composed class would leave out."""
    language = tmp_path / "gemma"
    copy_text_tokenizer(language)
    sizes = DECODER_SIZES | {"vocab_size": 1280}
    randomized(Gemma2ForCausalLM(Gemma2Config(**sizes, tie_word_embeddings=False)), language)
    with pytest.raises(UserError, match="gives other logits for a text than Gemma2ForCausalLM, which changes them"):
        compose(ComposeOptions(str(parts["clip"]), str(language), tmp_path / "made"))


class _Closed:
    """A tokenizer of a kind that takes no tokens."""

    def add_tokens(self, tokens: Any, special: bool) -> int:
        raise NotImplementedError("the vocabulary is fixed")


class _Splitting:
    """A tokenizer that takes a token and still splits its text."""

    def add_tokens(self, tokens: Any, special: bool) -> int:
        return 1

    def convert_tokens_to_ids(self, token: str) -> int:
        return 7

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(text.encode())


@pytest.mark.parametrize(
    ("tokenizer", "reason"), [(_Closed(), "the vocabulary is fixed"), (_Splitting(), "does not encode it as one token")]
)
def test_a_tokenizer_that_cannot_take_a_token_is_refused(tokenizer: Any, reason: str) -> None:
    with pytest.raises(UserError, match=rf"--language lm: the tokenizer cannot take the token '<image>' \(.*{reason}"):
        with_image_tokens(Language(None, tokenizer, "", {}, 0), ("<image>",), "lm")


@pytest.mark.slow("several commands")
@pytest.mark.parametrize(
    "projector", ["mlp2x-gelu", pytest.param("pixel-shuffle", marks=pytest.mark.slow("trains and merges again"))]
)
def test_it_is_inspected_trained_and_merged_like_any_model(
    projector: str, compose_once: Callable[[str, str], Path], tmp_path: Path
) -> None:
    folder = compose_once("clip_tower", projector)
    result = CliRunner().invoke(app, ["inspect-model", str(folder), "--json"])
    assert result.exit_code == 0, result.exception
    found = json.loads(result.stdout)
    assert {row["name"]: bool(row["num_adapted"]) for row in found["components"]} == dict.fromkeys(
        ("vision", "projector", "language"), True
    )
    lora = {"mode": "lora", "rank": 2}
    config = Config.model_validate(
        {
            "model": {"path": str(folder), "dtype": "float32"},
            "tune": {"vision": lora, "projector": {"mode": "full"}, "language": lora},
            "data": {"train": str(write_jsonl(tmp_path / "mixed.jsonl", mixed_rows(tmp_path, with_images=True)))},
            "train": {"steps": 2, "batch_size": 8, "learning_rate": 1e-2},
            "run": {"output_dir": str(tmp_path / "run")},
        }
    )
    train(config)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    merge(tmp_path / "run", tmp_path / "merged")
    merged, before = weights_in(tmp_path / "merged"), weights_in(folder)
    assert merged.keys() == before.keys()
    assert not torch.equal(
        merged["multi_modal_projector.linear_1.weight"], before["multi_modal_projector.linear_1.weight"]
    )


def test_the_command_prints_what_it_composed(parts: dict[str, Path], tmp_path: Path) -> None:
    words = ["--vision", str(parts["clip"]), "--language", str(parts["language"]), "-o", str(tmp_path / "made")]
    result = CliRunner().invoke(app, ["compose", *words])
    assert result.exit_code == 0, result.exception
    assert f"its class token dropped; {SIZE}x{SIZE} pixels, {SIDE}x{SIDE} patches, 16 tokens" in result.stderr
    assert "projector: mlp2x-gelu, 6,272 new parameters from seed 0" in result.stderr  # 32·64 + 64 + 64·64 + 64
    assert "<image> is token 1280, 1 new embeddings" in result.stderr


def test_the_shipped_configs_are_two_stages_of_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data_samples").symlink_to(ROOT / "data_samples")
    for name in ("model", "projector"):
        (tmp_path / "runs" / "compose" / name).mkdir(parents=True)
    files = [ROOT / "configs" / "compose" / f"{name}.yaml" for name in ("projector", "instructions")]
    first, second = (load_config(file) for file in files)
    assert first.model.path == second.model.path
    assert second.model.adapter == first.run.output_dir
    assert set(first.tune.trainable) == {"projector"}
    assert set(second.tune.trainable) == {"projector", "language"}
    assert all(file.read_text().startswith("# yaml-language-server: $schema=../schema.json\n") for file in files)
