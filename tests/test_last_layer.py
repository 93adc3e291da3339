"""The last layer's MLP, computed only where a token is predicted: the same loss and gradients as everywhere."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmtrain.config.schema import Config
from mmtrain.model.kernels.last_layer import last_mlp
from mmtrain.model.kernels.products import ROW_MULTIPLE
from mmtrain.model.kernels.rowwise import normalize
from support.learning import LORA, MIXED, learner_for, relative_l2, step_of

CUTS = [[0, 1, 2], [3], [4, 5, 6, 7]]


def watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows that go into each normalization of an MLP."""
    rows: list[int] = []

    def seen(x: Tensor, *rest: Any) -> Any:
        rows.append(len(x))
        return normalize(x, *rest)

    monkeypatch.setattr("mmtrain.model.kernels.mlp.normalize", seen)
    return rows


@pytest.mark.parametrize("settings", [{}, {"activation_checkpointing": True}], ids=str)
def test_what_nobody_looks_at_is_left_out(
    kind: str, settings: dict[str, Any], make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, dataset = learner_for(make_config(kind, {"language": LORA}, **settings))
    rows = watched(monkeypatch)
    found = step_of(learner, dataset, CUTS, packing=True)
    lengths = [int(dataset.checked.num_tokens[cut].sum()) for cut in CUTS]
    tokens = [math.ceil(length / ROW_MULTIPLE) * ROW_MULTIPLE for length in lengths]
    supervised = [int(dataset.checked.num_supervised[cut].sum()) for cut in CUTS]
    assert set(rows) == {*tokens, *supervised}
    assert all(few < many for few, many in zip(supervised, tokens, strict=True))

    monkeypatch.setattr("mmtrain.model.loss.replace", lambda row, predicting: row)
    rows.clear()
    expected = step_of(learner, dataset, CUTS, packing=True)
    assert set(rows) == set(tokens)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert relative_l2(found[1], expected[1]) < 1e-6  # measured: 7e-8


@pytest.mark.slow("steps under several settings")
def test_after_a_step_the_model_computes_every_token_again(make_config: Callable[..., Config]) -> None:
    learner, dataset = learner_for(make_config("qwen2_5_vl", MIXED))
    ids = torch.arange(10, 30)[None]
    before = learner.model(input_ids=ids, use_cache=False).logits
    step_of(learner, dataset, CUTS, packing=True)
    assert torch.equal(learner.model(input_ids=ids, use_cache=False).logits, before)


@pytest.mark.slow("steps under several settings")
def test_with_dropout_it_drops_what_the_whole_row_would(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, dataset = learner_for(make_config("qwen2_5_vl", {"language": {**LORA, "dropout": 0.3}}))
    assert isinstance(last_mlp(learner.model), nn.Module)
    rows = watched(monkeypatch)
    found = step_of(learner, dataset, CUTS, packing=True)
    fewest = min(rows)
    rows.clear()
    monkeypatch.setattr("mmtrain.model.loss.replace", lambda row, predicting: row)
    expected = step_of(learner, dataset, CUTS, packing=True)
    assert fewest < min(rows)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert relative_l2(found[1], expected[1]) < 1e-6  # measured: 1e-7
