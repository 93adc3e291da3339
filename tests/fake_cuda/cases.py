"""One case: a tiny model and a config, trained for a few steps on the CPU and then on the fake device.

What is found is plain data, for the process that asked.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fake_cuda import full_depth, whole_runs
from fake_cuda.device import FakeDevice
from mmtrain.config.schema import Config
from mmtrain.encoding.load import load_processor
from mmtrain.model.components import Components, base_name
from mmtrain.model.kernels import compiled
from mmtrain.model.kernels.rowwise import rms_norm
from mmtrain.progress import QUIET
from mmtrain.train.dataset import Dataset
from mmtrain.train.peak_memory import predict_peak
from mmtrain.train.step import Learner, train_step
from support.builders import MAKERS, mixed_rows, train_and_run, write_jsonl
from support.families_grid import GRID
from support.families_text import TEXT_ONLY
from support.families_tile import TILE
from support.family_models import make_family
from support.learning import learner_for, relative_l2, step_of
from support.meter import Meter

TEXT, ONE_IMAGE, FOUR_IMAGES = [1, 4], [0, 5], [0, 2, 3]
"""Samples of `mixed_rows` with so many images: none, two and four."""
FAMILIES = {**GRID, **TILE, **TEXT_ONLY}
WITHOUT_IMAGES = ("text", *TEXT_ONLY)
STEPS = {"text": TEXT, "two images": ONE_IMAGE, "four images": FOUR_IMAGES}


def _make_model(kind: str, changes: dict[str, Any], folder: Path) -> Path:
    make: Callable[[Path], Path] = MAKERS.get(kind) or (lambda path: make_family(FAMILIES[kind], path))
    file = make(folder / kind) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return file.parent


def _config(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    kind = case.get("kind", "qwen2_5_vl")
    rows = mixed_rows(folder / "data", with_images=kind not in WITHOUT_IMAGES)
    data = write_jsonl(folder / "data" / "mixed.jsonl", rows)
    settings = {"output_dir": str(folder / "run"), "batch_size": 8, "learning_rate": 1e-2, **case.get("settings", {})}
    return {
        "model": {
            "path": str(_make_model(kind, case.get("config", {}), folder)),
            "dtype": case.get("dtype", "bfloat16"),
        },
        "tune": case.get("tune", {"language": {"mode": "lora", "rank": 8, "alpha": 16.0}}),
        "data": {"train": [{"path": str(data)}]},
        **train_and_run(**settings),
    }


def run(case: dict[str, Any]) -> dict[str, Any]:
    """What the steps of `case` give on both devices, and what they ask of the fake one.

    `case` may have `kind` of model, `config`, keys of its config.json, `dtype`, `tune` and `settings`, keys of `train`
    and `run`.
    """
    if case.get("memory"):
        return dict(memory(case))
    if "full_depth" in case:
        return full_depth.run(case["full_depth"])
    if "sections" in case:
        return whole_runs.run(case)
    with tempfile.TemporaryDirectory() as name:
        config = _config(case, Path(name))
        on_cpu = _learner(config, "cpu")
        expected = [_gradients(*on_cpu, samples) for samples in STEPS.values()]
        device = FakeDevice()  # type: ignore[no-untyped-call]
        with device, Meter(hidden=("/torch/", "/fake_cuda/device.py")) as meter:
            learner, dataset = _learner(config, "cuda")
            places = {str(tensor.device) for tensor in _state(learner.model)}
            tower = _Tower(learner)
            first = [_step(learner, dataset, samples, meter, tower) for samples in STEPS.values()]
            again = [_step(learner, dataset, samples, meter, tower) for samples in STEPS.values()]
            peak = meter.peak
            learner.optimizer.step()
            kept = _bytes_of(learner)
            norm = _saved_by_norm()
            pixels = [] if case.get("kind") in WITHOUT_IMAGES else _types_of_pixels(learner, dataset)
        return {
            "packing": learner.packing,
            "pixels": pixels,
            "devices": sorted(places),
            "differences": [
                {"loss": abs(own["loss"] - loss) / abs(loss), "gradient": relative_l2(own.pop("gradients"), gradients)}
                for own, (loss, gradients) in zip(first, expected, strict=True)
            ],
            "first": dict(zip(STEPS, first, strict=True)),
            "again": {name: one | {"gradients": None} for name, one in zip(STEPS, again, strict=True)},
            "num_layers": learner.model.config.get_text_config().num_hidden_layers,
            "live_bytes": meter.live,
            "kept_bytes": kept,
            "peak_bytes": peak,
            "saved_by_norm": norm,
        }


@contextmanager
def _as_if_compiled(meter: Meter) -> Iterator[None]:
    """Inside, formulas count as compiled, and `meter` sees their results alone."""

    def in_one_kernel(formula: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with meter.paused():
                out = formula(*args, **kwargs)
            return tree_map_only(Tensor, lambda tensor: tensor.view(tensor.shape), out)

        return call

    with (
        patch.object(compiled, "compile_fault", lambda device: None),
        patch.object(compiled, "_compiled", in_one_kernel),
    ):
        yield


def memory(case: dict[str, Any]) -> dict[str, int]:
    """The bytes that two steps of `case` take at most on the fake device, and those that are predicted for a GPU.

    Nothing can be compiled here. So that formulas take the memory of compiled ones, the meter does not look inside.
    """
    with tempfile.TemporaryDirectory() as name:
        data = _config(case, Path(name))
        config = Config.model_validate(data)
        processor = load_processor(config.model.path)
        dataset = Dataset(config, processor, QUIET)
        predicted = predict_peak(config, dataset, processor, "cuda", 1, QUIET)
        samples = sorted(dataset.plan.step(1))
        device = FakeDevice()  # type: ignore[no-untyped-call]
        with device, Meter(hidden=("/torch/",)) as meter, _as_if_compiled(meter):
            learner, _ = _learner(data, "cuda")
            meter.reset()
            for step, count in ((1, 1), (2, 2)):
                num_supervised = count * int(dataset.checked.num_supervised[samples].sum())
                batches = learner.batches(dataset.train, [samples] * count)
                train_step(learner, batches, num_supervised, step, 1.0)
        return {"peak": meter.peak, "predicted": predicted.peak}


def _learner(config: dict[str, Any], device: str) -> tuple[Learner, Dataset]:
    return learner_for(Config.model_validate(config | {"run": config["run"] | {"device": device}}))


def _state(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _gradients(learner: Learner, dataset: Dataset, samples: Sequence[int]) -> tuple[float, dict[str, Tensor]]:
    return step_of(learner, dataset, [list(samples)], learner.packing)


class _Tower:
    """Watches the vision encoder: how often it is called, and how often from the backward pass or for it."""

    def __init__(self, learner: Learner) -> None:
        self.calls = self.in_backward = 0
        components = Components(getattr(learner.model, "get_base_model", lambda: learner.model)())
        for name, module in learner.model.named_modules():
            own = base_name(name).removeprefix("base_model.model.")
            if isinstance(module, nn.Linear) and components.component_of(own) == "vision":
                module.register_forward_hook(self._after)

    def _after(self, module: nn.Module, given: Any, out: Tensor) -> None:
        self.calls += 1
        self.in_backward += out.requires_grad or torch._C._current_graph_task_id() != -1


def _step(learner: Learner, dataset: Dataset, samples: Sequence[int], meter: Meter, tower: _Tower) -> dict[str, Any]:
    meter.reset()
    tower.calls = tower.in_backward = 0
    loss, gradients = _gradients(learner, dataset, samples)
    counts = {
        "kernels": meter.num_kernels,
        "by_kernel": dict(meter.kernels),
        "waits": dict(meter.waits),
        "pageable": dict(meter.pageable),
        "operations": meter.operations,
        "tower": tower.calls,
        "tower_in_backward": tower.in_backward,
    }
    return counts | {"loss": loss, "gradients": {name: value.cpu() for name, value in gradients.items()}}


def _types_of_pixels(learner: Learner, dataset: Dataset) -> list[str]:
    """Of the images that the loader gives."""
    images = [[span.image for span in dataset.train.encoded(sample).images] for sample in ONE_IMAGE]
    inputs, _ = learner.load_images([one for one in images if one])
    return sorted({str(value.dtype) for name, value in inputs.items() if name.startswith("pixel_values")})


def _saved_by_norm() -> list[str]:
    """Types of the large tensors that the norm kernel keeps for the backward pass under autocast."""
    saved: list[Tensor] = []

    def keep_one(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.ones(64, 32, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    weight = torch.ones(32, dtype=torch.bfloat16, device="cuda")
    keep = torch.autograd.graph.saved_tensors_hooks(keep_one, lambda tensor: tensor)
    with torch.autocast("cuda", torch.bfloat16), keep:
        rms_norm(x, weight, 1e-6)
    return [str(tensor.dtype) for tensor in saved if tensor.numel() == x.numel()]


def _bytes_of(learner: Learner) -> int:
    """Of the weights, their gradients and the optimizer's moments, without those that share memory."""
    state = [value for own in learner.optimizer.state.values() for value in own.values()]
    gradients = [p.grad for p in learner.model.parameters() if p.grad is not None]
    tensors = [tensor for tensor in [*_state(learner.model), *gradients, *state] if tensor.device.type == "cuda"]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
