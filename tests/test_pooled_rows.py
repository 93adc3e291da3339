"""A tower's last MLP is computed only where its embedding is pooled, and a tower that pools elsewhere is found out."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtrain.contrastive.embedder import EncodedItem
from mmtrain.contrastive.towers import Towers, _noise
from mmtrain.errors import UserError
from mmtrain.model.kernels.install import install
from mmtrain.records.pairs import Item
from support.builders import TINY
from support.pair_data import Exchange, learner_of, pair_config, write_pairs
from support.tower_models import TOWERS

POOLED = {
    "clip": {"image": 0, "text": -1},
    "siglip": {},  # texts are padded, and a head attends to all patches
    "chinese_clip": {"image": 0},  # BERT's MLP is not one module
}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Towers]:
    def made(name: str, kernels: str = "auto") -> Towers:
        config = pair_config(TOWERS[name](tmp_path / name), write_pairs(tmp_path), tmp_path / "run")
        config = config.model_copy(update={"run": config.run.model_copy(update={"kernels": kernels})})
        towers: Any = learner_of(config, Exchange(1), 0).embedder
        return towers  # type: ignore[no-any-return]

    return made


@pytest.mark.parametrize("name", POOLED)
def test_the_rows_that_embeddings_depend_on_are_found(name: str, make: Callable[..., Towers]) -> None:
    assert {kind: own._token for kind, own in make(name)._pooled.items()} == POOLED[name]


def test_the_last_mlp_gets_one_row_for_each_item(make: Callable[..., Towers]) -> None:
    towers, seen = make("clip"), list[int]()
    for layers in (towers.model.vision_model.encoder.layers, towers.model.text_model.encoder.layers):
        layers[-1].mlp.fc1.register_forward_hook(lambda module, args, out: seen.append(out.shape[0]))
    towers.probe()
    assert seen == [2, 2]


def test_a_text_with_an_end_token_in_its_middle_has_the_same_embedding(make: Callable[..., Towers]) -> None:
    found, expected = (
        towers.embed(towers.batch([encoded(towers, text) for text in ("a cat</s>and a dog", "one dog")]), "text")
        for towers in (make("clip"), make("clip", kernels="off"))
    )
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)


def encoded(towers: Towers, text: str) -> EncodedItem:
    (one,) = towers.encode([(Item(text), TINY)])
    assert isinstance(one, EncodedItem)
    return dataclasses.replace(one, key="0" * 15)


def pools_elsewhere(towers: Towers) -> None:
    """The class token's place is taken by the patch after it."""
    towers.model.vision_model.encoder.register_forward_hook(
        lambda module, args, out: type(out)(last_hidden_state=out.last_hidden_state.roll(-1, dims=1))
    )


def test_other_rows_are_refused_without_a_graph_and_with_it(make: Callable[..., Towers]) -> None:
    towers = make("clip")
    pools_elsewhere(towers)
    with pytest.raises(UserError, match="not a number"):
        towers.probe()
    images = towers._images(towers.processor.image_inputs([_noise(0), _noise(1)]))
    with pytest.raises(RuntimeError, match="rows that were left out"):
        torch.autograd.backward(towers.embed(images, "image").sum())


def test_a_tower_that_pools_elsewhere_computes_all_rows(make: Callable[..., Towers]) -> None:
    towers = make("clip", kernels="off")
    pools_elsewhere(towers)
    expected = towers.probe()
    install(towers.model)
    towers.leave_out_rows()
    assert set(towers._pooled) == {"text"}
    assert torch.allclose(towers.probe(), expected, rtol=1e-4, atol=1e-5)
