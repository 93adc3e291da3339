"""One contrastive run of another program, in its own environment, or the loss alone.

    python -m bench.contrastive_peer st|clip|accumulated|loss-clip|loss-own SETTINGS.json RESULT.json

Only `loss-own` imports mmtrain. Where a library is missing its published method is written in plain torch here.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

from bench.watch import Watch

Embed = Callable[[], tuple[Tensor, Tensor]]


def is_missing(library: str) -> bool:
    return importlib.util.find_spec(library) is None


def clip_loss(images: Tensor, texts: Tensor, scale: float) -> Tensor:
    """open_clip's loss of unit vectors, or the same in plain torch."""
    if not is_missing("open_clip"):
        from open_clip import ClipLoss

        found: Tensor = ClipLoss()(images, texts, scale)
        return found
    logits, own = scale * images @ texts.T, torch.arange(len(images))
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


class Towers:
    """The model of transformers with its inputs, which are made anew in each step."""

    def __init__(self, settings: dict[str, Any]) -> None:
        path = settings["model"]
        self.model = CLIPModel.from_pretrained(path).train()
        self._tokenizer = AutoTokenizer.from_pretrained(path)
        self._images = CLIPImageProcessorPil.from_pretrained(path)
        self._rows = read_rows(settings)

    def parts(self, size: int) -> list[Embed]:
        """The embeddings of so many pairs at a time."""
        images, texts = self._inputs()
        return [self._part(images[at : at + size], texts[at : at + size]) for at in range(0, len(images), size)]

    def _inputs(self) -> tuple[Tensor, list[str]]:
        opened = [Image.open(path).convert("RGB") for path, _ in self._rows]
        pixels: Tensor = self._images(images=opened, return_tensors="pt")["pixel_values"]
        return pixels, [text for _, text in self._rows]

    def _part(self, pixels: Tensor, texts: list[str]) -> Embed:
        inputs = self._tokenizer(texts, padding=True, return_tensors="pt")
        return lambda: (
            F.normalize(self.model.get_image_features(pixel_values=pixels).pooler_output, dim=-1),
            F.normalize(self.model.get_text_features(**inputs).pooler_output, dim=-1),
        )


def read_rows(settings: dict[str, Any]) -> list[tuple[Path, str]]:
    pairs = Path(settings["pairs"])
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    return [(pairs.parent / row["image"], row["text"]) for row in rows]


def one_pass(towers: Towers, scale: float, size: int) -> float:
    """Everything at once, as open_clip does by default."""
    (embed,) = towers.parts(10**9)
    loss = clip_loss(*embed(), scale)
    loss.backward()
    return float(loss.detach())


def accumulated(towers: Towers, scale: float, size: int) -> float:
    """open_clip's `--accum-freq`: features without gradients first, then each part again among the others' features."""
    parts = towers.parts(size)
    with torch.no_grad():
        cached = [embed() for embed in parts]
    loss = torch.zeros(())
    for number, embed in enumerate(parts):
        own = embed()
        sides = [
            torch.cat(
                [*(one[side] for one in cached[:number]), own[side], *(one[side] for one in cached[number + 1 :])]
            )
            for side in (0, 1)
        ]
        loss = clip_loss(*sides, scale)
        loss.backward()
    return float(loss.detach())


def cached(towers: Towers, scale: float, size: int) -> float:
    """The method of sentence-transformers (GradCache, Gao et al. 2021): gradients of embeddings, then a second pass."""
    parts = towers.parts(size)
    with torch.no_grad():
        first = [embed() for embed in parts]
    images, texts = (torch.cat([one[side] for one in first]).requires_grad_() for side in (0, 1))
    loss = clip_loss(images, texts, scale)
    loss.backward()
    assert images.grad is not None
    assert texts.grad is not None
    gradients = zip(images.grad.split(size), texts.grad.split(size), strict=True)
    for embed, given in zip(parts, gradients, strict=True):
        found = embed()
        ((found[0] * given[0]).sum() + (found[1] * given[1]).sum()).backward()
    return float(loss.detach())


def steps_of(kind: str, settings: dict[str, Any]) -> tuple[Any, Callable[[], float]]:
    """The model, and what computes the gradients of a step and gives its loss."""
    scale, size = settings["scale"], settings["mini_batch"]
    if kind == "st" and not is_missing("sentence_transformers"):
        return sentence_transformers(settings)
    towers = Towers(settings)
    compute = {"st": cached, "clip": one_pass, "accumulated": accumulated}[kind]
    return towers.model, lambda: compute(towers, scale, size)


def sentence_transformers(settings: dict[str, Any]) -> tuple[Any, Callable[[], float]]:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    model = SentenceTransformer(settings["model"], device="cpu").train()
    loss_of = CachedMultipleNegativesRankingLoss(
        model,
        scale=settings["scale"],
        mini_batch_size=settings["mini_batch"],
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )
    rows = read_rows(settings)

    def compute() -> float:
        opened: list[Any] = [Image.open(path).convert("RGB") for path, _ in rows]
        features = [model.preprocess(opened), model.preprocess([text for _, text in rows])]
        loss = loss_of(features, None)
        loss.backward()
        return float(loss.detach())

    return model, compute


def train(kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    watch = Watch(settings)
    model, compute = steps_of(kind, settings)
    trained = [value for name, value in model.named_parameters() if not name.endswith("logit_scale")]
    optimizer = torch.optim.AdamW(trained, lr=settings["learning_rate"], weight_decay=0.0)
    for _ in range(settings["steps"]):
        optimizer.zero_grad(set_to_none=True)
        loss = compute()
        optimizer.step()
        watch.end()
        watch.rows[-1]["loss"] = loss
    library = "sentence_transformers" if kind == "st" else "open_clip"
    return {"rows": watch.rows, "is_restated": is_missing(library)}


def loss_alone(kind: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Time and memory of the loss and its gradients; the memory that embeddings and libraries take is not counted."""
    compute = _own_loss if kind == "loss-own" else _other_loss
    sizes = iter(_sizes(settings))
    compute(*next(sizes), settings["scale"])  # what a library needs at its first call
    given = next(sizes)
    before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    loss = compute(*given, settings["scale"])
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    restated = kind == "loss-clip" and is_missing("open_clip")
    return {"cpu": time.process_time() - begun, "extra_gib": extra, "loss": loss, "is_restated": restated}


def _sizes(settings: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for num in (64, settings["num"]):
        images, noise = (torch.randn(num, settings["width"], generator=generator) for _ in range(2))
        yield F.normalize(images, dim=1), F.normalize(images + noise, dim=1)


def _other_loss(images: Tensor, texts: Tensor, scale: float) -> float:
    loss = clip_loss(images.requires_grad_(), texts.requires_grad_(), scale)
    loss.backward()
    return float(loss.detach())


def _own_loss(images: Tensor, texts: Tensor, scale: float) -> float:
    from mmtrain.contrastive.loss import LossSettings, contrastive_loss
    from mmtrain.contrastive.relation import Relation

    own = np.arange(len(images))
    relation = Relation(own, own, own, own, np.ones(len(own)), own, own)
    found = contrastive_loss(images, texts, relation, LossSettings("infonce"), torch.tensor(scale), torch.tensor(0.0))
    return float(found.loss)


def main() -> None:
    kind, settings_path, result_path = sys.argv[1:]
    settings = json.loads(Path(settings_path).read_text())
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    measure = loss_alone if kind.startswith("loss") else train
    Path(result_path).write_text(json.dumps(measure(kind, settings)))


if __name__ == "__main__":
    main()
