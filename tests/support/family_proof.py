"""One family trained for a step by mmtrain and by plain transformers and peft: where they differ, and what was found.

The reference takes each conversation alone, through the family's own processor and model, in float32, with all logits:
the sum of the negative log-likelihoods of the supervised tokens over their count, and what autograd makes of it.
"""

import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

from mmtrain.config.schema import Config
from mmtrain.encoding.encode import Encoded, Encoder
from mmtrain.encoding.load import load_processor
from mmtrain.encoding.processor import ChatProcessor
from mmtrain.encoding.processor_settings import ProcessorSettings
from mmtrain.model.components import COMPONENTS, Components
from mmtrain.model.load import model_structure
from mmtrain.progress import QUIET, Progress
from mmtrain.records.chat import SampleError
from mmtrain.runtime.processes import Runtime
from mmtrain.train.dataset import Dataset
from mmtrain.train.export import export
from mmtrain.train.learner import make_learner
from mmtrain.train.step import Learner
from support.builders import write_jsonl
from support.family_reference import (
    FAMILIES,
    as_messages,
    as_rows,
    conversations,
    directory,
    given_template,
    own_inputs,
    prompted_inputs,
)
from support.learning import LORA, relative_l2, step_of

EXACT, LOOSE, ROUNDED = 1e-5, 1e-4, 5e-3
"""The largest relative difference of the loss in float32, of all gradients as one vector and of its norm (plain
transformers in float32 is 8e-6 off itself in float64 for Gemma 4; Qwen3.5-MoE was between 1.5e-6 and 5.2e-5 in
several runs), and of the loss in bfloat16."""


@dataclass
class Proof:
    """What was found of a family."""

    refused: dict[str, str] = field(default_factory=dict)
    """Cases that mmtrain refuses, and why."""
    other_ids: list[str] = field(default_factory=list)
    """Cases whose ids are not the family's own."""
    alone: list[str] = field(default_factory=list)
    """Cases whose replies follow the prompt of inference, each in a sequence of its own."""
    differences: dict[str, float] = field(default_factory=dict)
    """Relative differences from the reference, by what is compared."""
    lines: list[str] = field(default_factory=list)
    """What mmtrain said about fallbacks."""
    packed: bool = False

    @property
    def failures(self) -> list[str]:
        """What is not as it must be."""
        off = [
            f"{name}: {value:.1e}"
            for name, value in self.differences.items()
            if not value <= (ROUNDED if name == "bfloat16" else LOOSE if "gradient" in name else EXACT)
        ]
        return [*(f"ids of {case}" for case in self.other_ids), *off]


def prove(name: str, root: Path, folder: Path) -> Proof:
    """Train family `name` for a step in `folder`; `root` has the images."""
    proof = Proof()
    processor = load_processor(str(directory(name)), ProcessorSettings(given_template(name)))
    encoder = Encoder(processor, end_of_turn=not FAMILIES[name].unended)
    tried, samples = {}, []
    for case, conversation in conversations(name).items():
        try:
            sequences = [one for _, one in encoder.sequences(conversation)]
            encoded = [encoder.encode(one, root) for one in sequences]
        except SampleError as error:
            proof.refused[case] = str(error)
            continue
        tried[case] = conversation
        for one, made in zip(sequences, encoded, strict=True):
            messages = as_messages(name, one, root)
            whole = own_inputs(name, messages, return_tensors="pt")
            is_whole = made.ids.tolist() == whole["input_ids"][0].tolist()
            inputs = whole if is_whole else prompted_inputs(name, messages, whole["input_ids"][0].tolist(), made)
            if len(sequences) > 1 or not is_whole:
                proof.alone.append(case)
            if inputs is None:
                proof.other_ids.append(case)
            samples.append((made, inputs))
    if proof.other_ids:
        return proof
    data = write_jsonl(folder / "cases.jsonl", as_rows(list(tried.values())))

    def config(mode: dict[str, Any], dtype: str = "float32") -> Config:
        output = folder / f"{mode['mode']}-{dtype}"
        output.mkdir()
        (output / "metrics.jsonl").touch()  # the model card shows its figures
        return Config.model_validate(
            {
                "model": {"path": str(directory(name)), "dtype": dtype, "chat_template": given_template(name)},
                "tune": _tune(name, mode),
                "data": {"train": [{"path": str(data), "root": str(root)}]},
                "labels": {"end_of_turn": not FAMILIES[name].unended},
                "train": {"steps": 1, "batch_size": len(samples)},
                "run": {"output_dir": str(output)},
            }
        )

    _lora(name, config(LORA), processor, samples, proof)
    loss = _full(name, config({"mode": "full"}), processor, samples, proof)
    learner, dataset, _ = _prepared(config(LORA, "bfloat16"), processor)
    proof.differences["bfloat16"] = _off(_loss_of(learner, dataset), loss)  # adapters do not change the loss at first
    return proof


def _tune(name: str, mode: dict[str, Any]) -> dict[str, Any]:
    """Every component in this mode; a projector without a linear layer takes no LoRA and is trained in full."""
    return {part: mode if has_linear else {"mode": "full"} for part, has_linear in _components(name).items()}


@cache
def _components(name: str) -> dict[str, bool]:
    """The components of a family, and whether each has a linear layer."""
    if not FAMILIES[name].images:
        return {"language": True}
    model = model_structure(str(directory(name)))
    components = Components(model)
    has_linear = {
        components.component_of(key) for key, module in model.named_modules() if isinstance(module, nn.Linear)
    }
    present = {components.component_of(key) for key, _ in model.named_parameters()}
    return {part: part in has_linear for part in COMPONENTS if part in present}


def plain(name: str) -> Any:
    """The family's model as transformers loads it."""
    auto = AutoModelForMultimodalLM if FAMILIES[name].images else AutoModelForCausalLM
    return auto.from_pretrained(directory(name), dtype=torch.float32).eval()


def _lora(
    name: str, config: Config, processor: ChatProcessor, samples: list[tuple[Encoded, Any]], proof: Proof
) -> None:
    learner, dataset, proof.lines = _prepared(config, processor)
    proof.packed = learner.packing
    fill_adapters(learner.model)
    order = _cuts(learner, dataset)
    found = {packing: step_of(learner, dataset, order, packing) for packing in {learner.packing, False}}
    export(learner, config, dataset)
    adapter = Path(config.run.output_dir) / "adapter"
    own = PeftModel.from_pretrained(plain(name), adapter, is_trainable=True).eval()
    loss, gradients = _reference(own, samples)
    for packing, (own_loss, own_gradients) in found.items():
        kind = "packed" if packing else "padded"
        proof.differences[f"LoRA loss, {kind}"] = _off(own_loss, loss)
        proof.differences[f"LoRA gradient norm, {kind}"] = _off(_norm(own_gradients), _norm(gradients))
        proof.differences[f"LoRA all gradients, {kind}"] = relative_l2(own_gradients, gradients)


def _full(
    name: str, config: Config, processor: ChatProcessor, samples: list[tuple[Encoded, Any]], proof: Proof
) -> float:
    """The loss of plain transformers."""
    learner, dataset, _ = _prepared(config, processor)
    order = _cuts(learner, dataset)
    own_loss, found = step_of(learner, dataset, order, learner.packing)
    model = plain(name)
    for parameter in _frozen_by_class(model):  # transformers loads them as trainable
        parameter.requires_grad_(False)
    loss, gradients = _reference(model, samples)
    proof.differences["full loss"] = _off(own_loss, loss)
    proof.differences["full gradient norm"] = _off(_norm(found), _norm(gradients))
    proof.differences["full, all gradients"] = relative_l2(found, gradients)
    export(learner, config, dataset)
    return loss


def _cuts(learner: Learner, dataset: Dataset) -> list[list[int]]:
    """All samples at once, or one by one where the family cannot."""
    used: list[int] = dataset.checked.used.tolist()
    return [[index] for index in used] if learner.alone else [used]


def _prepared(config: Config, processor: ChatProcessor) -> tuple[Learner, Dataset, list[str]]:
    lines: list[str] = []
    dataset = Dataset(config, processor, QUIET)
    progress = Progress(quiet=True)
    progress.say = lines.append  # type: ignore[method-assign, assignment]
    learner = make_learner(config, processor, Runtime(config.model.dtype, device="cpu"), progress)
    return learner, dataset, lines


def fill_adapters(model: Any) -> None:
    """Give every adapter's second matrix values: as it is made it is zero, and so are gradients of the first."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def _loss_of(learner: Learner, dataset: Dataset) -> float:
    return step_of(learner, dataset, _cuts(learner, dataset), learner.packing)[0]


def _reference(model: Any, samples: list[tuple[Encoded, Any]]) -> tuple[float, dict[str, Tensor]]:
    """The loss and the gradients of what is trainable, zero where nothing flows."""
    count = sum(encoded.num_supervised for encoded, _ in samples)
    total = 0.0
    for encoded, own in samples:
        inputs = {key: value.float() if value.is_floating_point() else value for key, value in own.items()}
        logits = model(**inputs, use_cache=False).logits[0, :-1].float()
        targets, supervised = torch.tensor(encoded.ids[1:]).long(), torch.tensor(encoded.supervised[1:])
        nll = F.cross_entropy(logits[supervised], targets[supervised], reduction="sum")
        torch.autograd.backward(nll / count)
        total += float(nll.detach())
    gradients = {
        key: (p.grad if p.grad is not None else torch.zeros_like(p))
        for key, p in model.named_parameters()
        if p.requires_grad
    }
    return total / count, gradients


def _frozen_by_class(model: Any) -> list[nn.Parameter]:
    """The parameters that the model's class does not train, such as counts that choose experts."""
    with torch.device("meta"):
        made = type(model)(model.config)
    return [model.get_parameter(name) for name, own in made.named_parameters() if not own.requires_grad]


def _norm(gradients: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in gradients.values()))


def _off(found: float, expected: float) -> float:
    return abs(found - expected) / abs(expected)
