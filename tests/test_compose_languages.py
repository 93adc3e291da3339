"""mmtrain compose with language models of several families, and with chat templates of several kinds."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mmtrain.compose.command import ComposeOptions, compose
from mmtrain.config.schema import Config
from mmtrain.encoding.load import load_processor
from mmtrain.errors import UserError
from mmtrain.merge.command import merge
from mmtrain.train.run import train
from support.builders import DECODER_SIZES, copy_text_tokenizer, make_text, mixed_rows, randomized, write_jsonl
from support.families_text import TEXT_ONLY
from support.family_models import make_family
from support.towers import PATCH, SIDE, make_clip, make_dinov2

SIZES = DECODER_SIZES | {"vocab_size": 1280}


def make_opt(path: Path, **settings: Any) -> Path:
    return made(OPTForCausalLM(opt_config(**settings)), path)


def opt_config(**settings: Any) -> OPTConfig:
    return OPTConfig(**SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32, "tie_word_embeddings": True} | settings)


def make_mamba(path: Path) -> Path:
    return made(MambaForCausalLM(MambaConfig(**SIZES)), path)


def made(model: Any, path: Path) -> Path:
    copy_text_tokenizer(path)
    return randomized(model, path)


def with_sizes(config: Any, **settings: Any) -> Any:
    return config(**SIZES | {"num_key_value_heads": 2} | settings)


LANGUAGES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(with_sizes(LlamaConfig, tie_word_embeddings=False)),
    "qwen2, tied": lambda: Qwen2ForCausalLM(with_sizes(Qwen2Config, tie_word_embeddings=True)),
    "mistral": lambda: MistralForCausalLM(with_sizes(MistralConfig, tie_word_embeddings=False)),
    "gemma, tied": lambda: GemmaForCausalLM(with_sizes(GemmaConfig, tie_word_embeddings=True)),
    "neox": lambda: GPTNeoXForCausalLM(with_sizes(GPTNeoXConfig, tie_word_embeddings=False)),
    "neox, tied": lambda: GPTNeoXForCausalLM(with_sizes(GPTNeoXConfig, tie_word_embeddings=True)),
    "bloom, tied": lambda: BloomForCausalLM(with_sizes(BloomConfig, tie_word_embeddings=True)),
    "opt, tied": lambda: OPTForCausalLM(opt_config()),
}
FAST = "opt, tied"


@torch.no_grad()
def hand_wired(composed: Any, tower: Path, language: Path, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """(num_tokens, 1280) logits by the two models alone; only the projector's weights are from `composed`."""
    vision = AutoModel.from_pretrained(tower).eval().vision_model
    features = vision(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    model = AutoModelForCausalLM.from_pretrained(language).eval()
    place = composed.config.image_token_id
    embeddings = model.get_input_embeddings()(ids[0].where(ids[0] != place, 0))  # Gemma's scales what it gives
    embeddings[ids[0] == place] = composed.model.multi_modal_projector(features)[0]
    logits: torch.Tensor = model(inputs_embeds=embeddings[None]).logits[0]
    return logits


@pytest.mark.slow("models are composed")
@pytest.mark.parametrize(
    "name", [name if name == FAST else pytest.param(name, marks=pytest.mark.slow("a family")) for name in LANGUAGES]
)
def test_each_family_computes_what_its_parts_do_and_is_trained_and_merged(name: str, tmp_path: Path) -> None:
    tower, language, folder = make_clip(tmp_path / "clip"), made(LANGUAGES[name](), tmp_path / "lm"), tmp_path / "vlm"
    compose(ComposeOptions(str(tower), str(language), folder))
    inputs, span = load_processor(str(folder)).image_inputs([[PIL.Image.radial_gradient("L").convert("RGB")]])
    ids = torch.tensor([[5, 6, 7, *span, 8, 9]])
    composed = AutoModelForImageTextToText.from_pretrained(folder).eval()
    found = composed(input_ids=ids, **inputs).logits[0, :, :1280].detach()
    expected = hand_wired(composed, tower, language, ids, inputs["pixel_values"])
    assert float((found - expected).norm() / expected.norm()) < 1e-6
    lora = {"mode": "lora", "rank": 2}
    config = {
        "model": {"path": str(folder), "dtype": "float32"},
        "tune": {"vision": lora, "projector": {"mode": "full"}, "language": lora},
        "data": {"train": str(write_jsonl(tmp_path / "mixed.jsonl", mixed_rows(tmp_path, with_images=True)))},
        "train": {"steps": 1, "batch_size": 4, "learning_rate": 1e-2},
        "run": {"output_dir": str(tmp_path / "run")},
    }
    train(Config.model_validate(config))
    merge(tmp_path / "run", tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.image_token_id == composed.config.image_token_id
    after = merged(input_ids=ids, **inputs).logits[0, :, :1280].detach()
    assert float((after - expected).norm() / expected.norm()) > 1e-4  # the step was taken


def test_a_head_that_the_composed_class_cannot_tie_is_stored_on_its_own(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """OPT's embeddings have another name than those to which LLaVA ties its head."""
    compose(ComposeOptions(str(make_clip(tmp_path / "clip")), str(make_opt(tmp_path / "lm")), tmp_path / "vlm"))
    assert "its head no longer shares the weight of its embeddings" in capfd.readouterr().err
    with (
        safe_open(tmp_path / "vlm" / "model.safetensors", framework="pt") as found,
        safe_open(tmp_path / "lm" / "model.safetensors", framework="pt") as own,
    ):
        expected = own.get_tensor("model.decoder.embed_tokens.weight")
        heads = [name for name in found.keys() if name.endswith("lm_head.weight")]  # noqa: SIM118 (not a dict)
        assert len(heads) == 1
        assert torch.equal(found.get_tensor(heads[0])[:1280], expected)


def make_phi(path: Path) -> Path:
    return made(PhiForCausalLM(PhiConfig(**SIZES)), path)


def make_narrow(path: Path) -> Path:
    return make_opt(path, word_embed_proj_dim=16)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (make_phi, r"the head of PhiForCausalLM has a bias, and that of LlavaForConditionalGeneration none: use"),
        (make_narrow, r"its embeddings are 16 wide and its layers 32: a projector needs them to be equal"),
        (make_mamba, r"LlavaForConditionalGeneration cannot run MambaForCausalLM: .*: use another language model"),
        (
            partial(make_family, TEXT_ONLY["xlstm"]),
            r"LlavaForConditionalGeneration cannot run xLSTMForCausalLM: .*: use",
        ),
        (partial(make_family, TEXT_ONLY["gemma4_text"]), "Gemma4ForCausalLM cannot run an image's features: .*: use"),
    ],
)
def test_a_language_model_that_does_not_fit_is_refused(
    make: Callable[[Path], Path], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"--language {tmp_path}/lm: {reason}") as caught:
        compose(ComposeOptions(str(make_clip(tmp_path / "clip")), str(make(tmp_path / "lm")), tmp_path / "vlm"))
    assert len(caught.value.faults) == 1
    assert not (tmp_path / "vlm").exists()


TURN = "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n"
END = "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TEMPLATES = {
    "a string": f"{TURN}{{{{ turn['content'] + '' }}}}{END}",
    "parts": f"{TURN}{{% for part in turn['content'] %}}{{{{ part['text'] }}}}{{% endfor %}}{END}",
}


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_template_gets_content_in_the_form_that_it_takes(kind: str, tmp_path: Path) -> None:
    language = make_text(tmp_path / "lm")
    (language / "chat_template.jinja").write_text(TEMPLATES[kind], encoding="utf-8")
    compose(ComposeOptions(str(make_dinov2(tmp_path / "dinov2")), str(language), tmp_path / "vlm"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "vlm")
    texts = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in texts]
    expected = "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\nThat.<|im_end|>\n"
    for turns in (texts, parts):
        assert tokenizer.apply_chat_template(turns, tokenize=False) == expected
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}
    found = tokenizer.apply_chat_template([turn], tokenize=False)
    assert found == "<|im_start|>user\n<image>\nWhat?<|im_end|>\n"


def test_a_layer_of_which_transformers_gives_no_features_is_refused(tmp_path: Path) -> None:
    """transformers takes layer 0, the embeddings of the patches, for no layer at all."""
    tower, language = make_clip(tmp_path / "clip"), make_text(tmp_path / "lm")
    with pytest.raises(UserError, match="--feature-layer 0: LlavaForConditionalGeneration has no features of an image"):
        compose(ComposeOptions(str(tower), str(language), tmp_path / "vlm", feature_layer=0))


def test_an_encoder_without_its_own_image_processor_is_refused(tmp_path: Path) -> None:
    language, tower = str(make_text(tmp_path / "lm")), make_clip(tmp_path / "clip")
    settings = tower / "preprocessor_config.json"
    before = settings.read_text(encoding="utf-8")
    settings.write_text(before.replace(str(SIDE * PATCH), "42"), encoding="utf-8")
    with pytest.raises(UserError, match=r"1x3x42x42 as its image processor makes them \(.*: use an encoder with a"):
        compose(ComposeOptions(str(tower), language, tmp_path / "vlm"))
    settings.unlink()
    with pytest.raises(UserError, match=r"clip: it has no preprocessor_config.json: expected an image encoder"):
        compose(ComposeOptions(str(tower), language, tmp_path / "vlm"))
