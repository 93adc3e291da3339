"""The loss and its gradient against a plain reference: one sample at a time, full logits, shifted, fp32."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoImageProcessor, AutoTokenizer

from mmtrain.config.schema import Config
from mmtrain.records.chat import Conversation, Image, Message, Text
from support.learning import ALL_FULL, LORA, MIXED, learner_for, relative_l2, step_of


def user_turn(message: Message, placeholders: list[str], llava: bool) -> str:
    """A user's turn as the model's template writes it, its images' placeholders laid out."""
    left = iter(placeholders)
    if llava:
        return "USER: " + "".join(f"{span}\n" for span in placeholders) + f"{message.text} "
    parts = [
        part.text if isinstance(part, Text) else f"<|vision_start|>{next(left)}<|vision_end|>" for part in message.parts
    ]
    return "<|im_start|>user\n" + "".join(parts) + "<|im_end|>\n"


def reference_nll(model: Any, path: Path, conversation: Conversation, root: Path) -> tuple[torch.Tensor, int]:
    """Sum of the negative log-likelihoods of a conversation's answers, and their count; the text laid out by hand."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    llava = "<image>" in tokenizer.get_vocab()
    ids, labels, pixels = [], [], []
    text = "<s>" if llava else "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    for message in conversation.messages:
        if message.role == "user":
            placeholders = []
            for image in (part for part in message.parts if isinstance(part, Image)):
                decoded = PIL.Image.open(root / image.name).convert("RGB")
                made = AutoImageProcessor.from_pretrained(path, backend="pil")(images=[decoded], return_tensors="pt")
                pixels.append(made)
                placeholders.append("<image>" * 16 if llava else "<|image_pad|>" * (made["image_grid_thw"].prod() // 4))
            text += user_turn(message, placeholders, llava)
            continue
        prompt = tokenizer.encode(
            text + ("ASSISTANT:" if llava else "<|im_start|>assistant\n"), add_special_tokens=False
        )
        answer = tokenizer.encode(
            f" {message.text}</s>" if llava else f"{message.text}<|im_end|>", add_special_tokens=False
        )
        ids += prompt + answer
        labels += [-100] * len(prompt) + answer
        text = " " if llava else "\n"
    inputs = {key: torch.cat([made[key] for made in pixels]) for key in (pixels[0] if pixels else ())}
    input_ids, target = torch.tensor([ids]), torch.tensor(labels)
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (input_ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    logits = model(input_ids=input_ids, **inputs).logits[0].float()
    return F.cross_entropy(logits[:-1], target[1:], ignore_index=-100, reduction="sum"), int((target >= 0).sum())


@pytest.mark.parametrize(
    ("packing", "tune"),
    [
        pytest.param(True, MIXED, id="packed-lora_and_full"),
        pytest.param(False, ALL_FULL, id="padded-all_full"),
        pytest.param(False, MIXED, id="padded-lora_and_full", marks=pytest.mark.slow("rows and tuning the other way")),
        pytest.param(True, ALL_FULL, id="packed-all_full", marks=pytest.mark.slow("rows and tuning the other way")),
    ],
)
def test_loss_and_gradients_equal_the_reference(
    kind: str, tune: dict[str, Any], packing: bool, make_config: Callable[..., Config]
) -> None:
    config = make_config(kind, tune if kind != "text" else {"language": tune["language"]}, packing=packing)
    learner, dataset = learner_for(config)
    loss, gradients = step_of(learner, dataset, [list(range(8))], packing)

    learner.optimizer.zero_grad(set_to_none=True)
    total, count = torch.zeros(()), 0
    root = Path(config.data.train[0].path).parent
    for number in range(8):
        nll, tokens = reference_nll(
            learner.model, Path(config.model.path), dataset.train.records.conversation(number), root
        )
        total, count = total + nll, count + tokens
    (total / count).backward()  # type: ignore[no-untyped-call]
    learning = {name: p for name, p in learner.model.named_parameters() if p.requires_grad}
    expected = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in learning.items()}

    assert count == dataset.checked.num_supervised.sum()
    assert abs(loss - total.item() / count) <= 1e-5 * abs(loss)
    assert relative_l2(gradients, expected) <= 1e-5  # measured: at most 1e-6
    assert sum(bool(value.any()) for value in expected.values()) > 0.7 * len(
        expected
    )  # LLaVA skips its last vision layer


@pytest.mark.slow("steps under several settings")
def test_activations_computed_again_change_nothing(kind: str, make_config: Callable[..., Config]) -> None:
    tune = MIXED if kind != "text" else {"language": {**LORA, "dropout": 0.1}}
    found = []
    for again in (False, True):
        learner, dataset = learner_for(make_config(kind, tune, activation_checkpointing=again))
        layers = [m for m in learner.model.modules() if getattr(m, "gradient_checkpointing", False) and m.training]
        assert bool(layers) == again
        found.append(step_of(learner, dataset, [list(range(8))], True))
    assert found[0][0] == found[1][0]
    assert relative_l2(found[1][1], found[0][1]) == 0
