"""Compiled layers give the gradients of plain ones, whatever the length of a batch."""

import shutil
from collections.abc import Callable

import pytest
import torch

from mmtrain.config.schema import Config
from mmtrain.model.kernels.last_layer import last_mlp
from support.learning import LORA, learner_for, relative_l2, step_of


@pytest.mark.slow("compiles every layer with a C++ compiler")
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")
@pytest.mark.filterwarnings("ignore")
def test_compiled_layers_give_the_same_gradients(make_config: Callable[..., Config]) -> None:
    """With dropout in the adapters of the attention, and an MLP that is one function with its norm."""
    tune = {"language": {**LORA, "dropout": 0.1, "targets": ["q_proj", "v_proj"]}}
    plain, dataset = learner_for(make_config("qwen2_5_vl", tune))
    made, _ = learner_for(make_config("qwen2_5_vl", tune, compile=True))
    assert last_mlp(plain.model) is not None
    torch._dynamo.reset()
    compiled = []
    for cuts in ([[0, 1, 2, 3], [4, 5, 6, 7]], [[0], [1, 2], [3, 4, 5, 6, 7]]):
        loss, gradients = step_of(made, dataset, cuts, packing=True)
        expected, reference = step_of(plain, dataset, cuts, packing=True)
        assert loss == pytest.approx(expected, rel=1e-6)
        assert relative_l2(gradients, reference) < 1e-5  # measured: 4e-7
        compiled.append(torch._dynamo.utils.counters["frames"]["ok"])
    assert compiled[0] > 0
