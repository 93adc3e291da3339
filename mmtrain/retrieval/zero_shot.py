"""Zero-shot classification: an image belongs to the class whose text is closest (Radford et al., Learning Transferable
Visual Models From Natural Language Supervision, 2021, section 3.1).

The embedding of a class is the mean of those of its templates, each a unit vector, made a unit vector again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from mmtrain.contrastive.pair_samples import PairSamples
from mmtrain.contrastive.relation import Numbers
from mmtrain.dataset.plan import Indices
from mmtrain.errors import UserError
from mmtrain.records.pairs import Item
from mmtrain.retrieval.metrics import means, metrics_of
from mmtrain.retrieval.ranking import Pairs, rank_positives
from mmtrain.safe_text import shown, visible
from mmtrain.text_files import read_text


@dataclass(frozen=True, slots=True)
class Classes:
    """The classes, and the templates that say each: a template has `{}` in the place of the class."""

    names: tuple[str, ...]
    templates: tuple[str, ...]

    def items(self) -> list[Item]:
        """(num_classes * num_templates) The texts of a class are next to each other."""
        return [Item(template.replace("{}", name)) for name in self.names for template in self.templates]

    def embeddings(self, of_items: torch.Tensor) -> torch.Tensor:
        """(num_classes, dim) of the embeddings of `items`, unit vectors."""
        return F.normalize(of_items.view(len(self.names), len(self.templates), -1).mean(1), dim=-1)


def read_classes(path: Path, templates: Sequence[str]) -> Classes:
    """The classes of a text file with one on each line. Raises UserError where one cannot be used."""
    where = f"--classes {visible(str(path))}"
    names = [line.strip() for line in read_text(path, where).splitlines() if line.strip()]
    if len(names) < 2 or len(set(names)) < len(names):
        raise UserError(f"{where}: expected at least two different classes, one on each line")
    if wrong := [template for template in templates if template.count("{}") != 1]:
        raise UserError(f"--template {shown(wrong[0])}: expected one {{}} in it, where the class is put")
    return Classes(tuple(names), tuple(templates) or ("{}",))


def labels(samples: PairSamples, used: Indices, classes: Classes) -> tuple[Numbers, Pairs]:
    """The distinct images of the samples, and the classes of each: those that are texts of its samples.

    Raises UserError naming the place of every sample that is not an image with the name of a class.
    """
    position = {name: at for at, name in enumerate(classes.names)}
    faults: list[str] = []
    found: set[tuple[int, int]] = set()
    for index in used.tolist():
        pair = samples.records.pair(index)
        own = [position[item.text] for item in pair.positives if item.text in position and not item.images]
        if not pair.query.images or not own:
            texts = ", ".join(shown(item.text, 40) for item in pair.positives)
            faults.append(f"{samples.records.place(index)}: expected an image with the name of a class, found {texts}")
        found |= {(samples.pairs[index].query, at) for at in own}
    if faults:
        raise UserError(faults)
    pairs = np.array(sorted(found), np.int64)
    images, rows = np.unique(pairs[:, 0], return_inverse=True)
    return images, np.stack([rows, pairs[:, 1]], axis=1)


def zero_shot_figures(images: torch.Tensor, of_classes: torch.Tensor, pairs: Pairs, classes: Classes) -> dict[str, Any]:
    """`accuracy@1` and `accuracy@5` with 95 % intervals, the mean over classes of `accuracy@1`, and that of each class.

    `images` (num_images, dim) and `of_classes` (num_classes, dim) are unit vectors; `pairs`: an image and a class that
    it has. An image with several classes is right with any of them.
    """
    values = metrics_of(rank_positives(images, of_classes, pairs))
    chosen = {f"accuracy@{k}": values[f"recall@{k}"] for k in (1, 5) if k < len(classes.names)}
    right = values["recall@1"][pairs[:, 0]]
    by_class = {
        name: float(right[pairs[:, 1] == at].mean())
        for at, name in enumerate(classes.names)
        if (pairs[:, 1] == at).any()
    }
    return means(chosen) | {
        "mean_class_accuracy": float(np.mean(list(by_class.values()))),
        "by_class": by_class,
        "num_images": len(images),
        "num_classes": len(classes.names),
        "templates": list(classes.templates),
    }
