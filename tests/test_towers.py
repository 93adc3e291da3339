"""Dual encoders are tried when they are loaded: what computes in another way is refused in one line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import CLIPModel, FlavaConfig, FlavaModel, OwlViTConfig, OwlViTModel

from mmtrain.contrastive.load import load_towers
from mmtrain.contrastive.towers import Towers
from mmtrain.errors import UserError
from mmtrain.runtime.processes import Runtime
from support.builders import randomized
from support.pair_data import pair_config
from support.tower_models import SIDE, SMALL, _images, _tokenizer, make_clip


def loaded(path: Path) -> Towers:
    config = pair_config(path, Path("pairs.jsonl"), Path("run"))
    return load_towers(config, Runtime("float32", device="cpu"))


def make_owlvit(path: Path) -> Path:
    """Its text tower does not say where its embeddings are."""
    text = {**SMALL, **_tokenizer(path)}
    _images(path, "CLIPImageProcessor", size={"shortest_edge": SIDE})
    vision = {**SMALL, "image_size": SIDE, "patch_size": 8}
    return randomized(OwlViTModel(OwlViTConfig(text_config=text, vision_config=vision, projection_dim=16)), path)


def make_flava(path: Path) -> Path:
    """It has another name for its image tower, and no similarities of its own."""
    text = {**SMALL, **_tokenizer(path)}
    _images(path, "FlavaImageProcessor")
    vision = {**SMALL, "image_size": SIDE, "patch_size": 8}
    config = FlavaConfig(text_config=text, image_config=vision, multimodal_config=SMALL, projection_dim=16)
    return randomized(FlavaModel(config), path)


def test_the_embeddings_of_words_are_found_where_the_model_does_not_name_them(tmp_path: Path) -> None:
    towers = loaded(make_owlvit(tmp_path / "owlvit"))
    assert towers.word_embeddings.num_embeddings == towers.model.config.text_config.vocab_size
    assert towers.width == 16


def test_a_family_without_towers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"flava: the towers of the model were not found: this family"):
        loaded(make_flava(tmp_path / "flava"))


def fails(self: Any, **inputs: Any) -> Any:
    raise ValueError("expected\nvideos")


def squared(own: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, **inputs: Any) -> Any:
        out = own(self, **inputs)
        out.logits_per_text = out.logits_per_text.square()
        return out

    return forward


@pytest.mark.parametrize(
    ("method", "changed", "words"),
    [
        ("get_image_features", fails, r"clip: the model does not embed .*: ValueError: expected videos"),
        ("forward", squared(CLIPModel.forward), "clip: the model's similarities are not a scale times the cosine"),
    ],
)
def test_a_model_that_computes_in_another_way_is_refused(
    method: str, changed: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CLIPModel, method, changed)
    with pytest.raises(UserError, match=words) as caught:
        loaded(make_clip(tmp_path / "clip"))
    assert "\n" not in str(caught.value)
