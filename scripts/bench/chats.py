"""The chats that are trained on, with drawn images: the same every time.

Shaped like a mix of real ones: a chat has one to three images (80, 14 and 6 %) and one to three turns (65, 25 and
10 %); first answers have 18 to 210 words, the short ones being more frequent, later ones at most 60. A padded batch of
eight is then 35 to 40 % padding.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import PIL.Image
import PIL.ImageDraw

from bench.shapes import Shape

TEXT = """
the picture shows a small red circle near the left border and a larger blue triangle that covers part of it while the
ground behind them stays even so that every outline is easy to follow from here to there and back again
"""
WORDS = TEXT.split()


def make_data(folder: Path, shape: Shape, num_samples: int) -> Path:
    """A file of chats next to the folder of their images."""
    rng = random.Random(7)
    path = folder / "chats.jsonl"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(num_samples):
        (num_images,) = rng.choices((1, 2, 3), (80, 14, 6))
        (num_turns,) = rng.choices((1, 2, 3), (65, 25, 10))
        names = [f"images/{number}-{n}.png" for n in range(num_images)]
        for name in names:
            _draw(rng, _size(rng, shape, num_images)).save(folder / name)
        messages = []
        for turn in range(num_turns):
            asked = "<image>" * len(names) * (turn == 0) + _words(rng, rng.randint(4, 16))
            most = 60 if turn else 210
            answered = _words(rng, round(18 * (most / 18) ** rng.random() ** 0.8))
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        rows.append({"messages": messages, "images": names})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _words(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(WORDS, k=count))


def _size(rng: random.Random, shape: Shape, num_images: int) -> tuple[int, int]:
    """Pixels; a chat of several images has smaller ones, as large together as one."""
    least, most = shape.sides
    most = max(least, round(most / math.sqrt(num_images)))
    if not shape.photos:
        return rng.randint(least, most), rng.randint(least, most)
    longer = rng.randint(least, most)
    size = (longer, longer * 3 // 4)
    return size if rng.random() < 0.5 else size[::-1]


def _draw(rng: random.Random, size: tuple[int, int]) -> PIL.Image.Image:
    image = PIL.Image.new("RGB", size, tuple(rng.randrange(256) for _ in range(3)))
    pen = PIL.ImageDraw.Draw(image)
    for _ in range(rng.randint(1, 5)):
        x, y, side = rng.randrange(size[0]), rng.randrange(size[1]), rng.randint(10, 120)
        pen.ellipse((x, y, x + side, y + side), tuple(rng.randrange(256) for _ in range(3)))
    return image
