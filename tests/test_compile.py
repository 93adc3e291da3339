"""Compiled layers learn what plain ones learn, whatever the length of a batch."""

import shutil
from collections.abc import Callable

import pytest
import torch
from learning import LORA, learner_for, relative_l2, step_of

from mmtrain.config.schema import Config


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_compiled_layers_give_the_same_gradients(dropout: float, make_config: Callable[..., Config]) -> None:
    tune = {"language": {**LORA, "dropout": dropout}}
    plain, dataset = learner_for(make_config("qwen2_5_vl", tune))
    made, _ = learner_for(make_config("qwen2_5_vl", tune, compile=True))
    torch._dynamo.reset()
    compiled = []
    for cuts in ([[0, 1, 2, 3], [4, 5, 6, 7]], [[0], [1, 2], [3, 4, 5, 6, 7]]):
        loss, gradients = step_of(made, dataset, cuts, packing=True)
        expected, reference = step_of(plain, dataset, cuts, packing=True)
        assert loss == pytest.approx(expected, rel=1e-6)
        assert relative_l2(gradients, reference) < 1e-5  # measured: 4e-7
        compiled.append(torch._dynamo.utils.counters["frames"]["ok"])
    assert compiled[0] > 0
    assert dropout or compiled[1] == compiled[0]  # where the samples of a row end is not compiled in
