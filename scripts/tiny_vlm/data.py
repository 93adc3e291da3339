"""Images of coloured shapes, questions about them, and the text the tiny tokenizer is trained on.

Everything here follows from a seed: the same seed gives the same images and the same rows. A row is
``{"messages": [...], "images": [...]}`` with ``<image>`` in the first user message.

Run as a program, it writes the rows and images of the quickstart:

    python scripts/tiny_vlm/data.py data_samples/quickstart
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

SIZE = 64
SCALE = 4  # drawn this many times larger, then reduced, which smooths the edges
KINDS = ("circle", "rectangle", "triangle")
# The eight colours of easy-VQA, so that its held-out images can be asked about as well.
COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
}
NUMBERS = ("zero", "one", "two", "three")
QUICKSTART_QUESTIONS = (
    "Describe the picture.",
    "Describe this picture.",
    "Can you describe the picture?",
    "Please describe what you see.",
)
Turn = tuple[str, str]
Row = dict[str, list[Any]]


@dataclass
class Shape:
    """One coloured shape; the box is (left, top, right, bottom) in pixels of the finished image."""

    kind: str
    colour: str
    box: tuple[float, float, float, float]

    @property
    def x(self) -> float:
        return (self.box[0] + self.box[2]) / 2

    @property
    def y(self) -> float:
        return (self.box[1] + self.box[3]) / 2


def random_shape(rng: random.Random, kind: str, colour: str, largest: float) -> Shape:
    """A shape of random size and place that lies inside the image."""
    width = rng.uniform(8, largest)
    height = rng.uniform(8, largest) if kind == "rectangle" else width * (0.87 if kind == "triangle" else 1)
    left, top = rng.uniform(0, SIZE - width), rng.uniform(0, SIZE - height)
    return Shape(kind, colour, (left, top, left + width, top + height))


def apart(a: Shape, b: Shape, gap: float = 2) -> bool:
    """Whether two boxes keep a gap between them."""
    return (
        a.box[2] + gap < b.box[0] or b.box[2] + gap < a.box[0] or a.box[3] + gap < b.box[1] or b.box[3] + gap < a.box[1]
    )


def random_scene(rng: random.Random, count: int) -> list[Shape]:
    """That many shapes which differ in kind and in colour and do not touch."""
    while True:
        kinds, colours = rng.sample(KINDS, count), rng.sample(list(COLOURS), count)
        shapes = [random_shape(rng, k, c, 34 if count == 1 else 26) for k, c in zip(kinds, colours, strict=True)]
        if all(apart(a, b) for i, a in enumerate(shapes) for b in shapes[:i]):
            return shapes


def draw(shapes: list[Shape], rng: random.Random) -> Image.Image:
    """The image of the shapes on a pale background."""
    background = tuple(rng.randint(230, 255) for _ in range(3))
    image = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE), background)
    pen = ImageDraw.Draw(image)
    for shape in shapes:
        left, top, right, bottom = (v * SCALE for v in shape.box)
        colour = COLOURS[shape.colour]
        if shape.kind == "circle":
            pen.ellipse((left, top, right, bottom), fill=colour)
        elif shape.kind == "rectangle":
            pen.rectangle((left, top, right, bottom), fill=colour)
        else:
            pen.polygon([(left, bottom), (right, bottom), ((left + right) / 2, top)], fill=colour)
    return image.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def yes_no(truth: bool) -> str:
    return "yes" if truth else "no"


def kind_turn(shapes: list[Shape], rng: random.Random) -> Turn:
    """Asks for a shape: the only one, or the one of a colour."""
    shape = rng.choice(shapes)
    if len(shapes) == 1 and rng.random() < 0.7:
        question = rng.choice(
            [
                "What shape is in the image?",
                "What shape is present?",
                "What shape does the image contain?",
                "Which shape is this?",
            ]
        )
    else:
        question = rng.choice(["What is the {} shape?", "What shape is {}?"]).format(shape.colour)
    return question, shape.kind


def colour_turn(shapes: list[Shape], rng: random.Random) -> Turn:
    """Asks for a colour: of the only shape, or of the shape of a kind."""
    shape = rng.choice(shapes)
    name = "shape" if len(shapes) == 1 and rng.random() < 0.6 else shape.kind
    question = rng.choice(["What color is the {}?", "What is the color of the {}?", "Which color does the {} have?"])
    return question.format(name), shape.colour


def presence_turn(shapes: list[Shape], rng: random.Random) -> Turn:
    """Asks yes or no for a kind or a colour, in half of the cases one that is there, also in the negative."""
    there = rng.random() < 0.5
    if rng.random() < 0.5:
        choices, seen = [f"{c} shape" for c in COLOURS], [f"{s.colour} shape" for s in shapes]
    else:
        choices, seen = list(KINDS), [s.kind for s in shapes]
    absent = [c for c in choices if c not in seen]
    there = there or not absent
    name = rng.choice(seen if there else absent)
    if rng.random() < 0.4:
        question = rng.choice(
            [
                "Is there not a {}?",
                "Is no {} present?",
                "Does the image not contain a {}?",
                "Is there not a {} in the image?",
            ]
        )
        return question.format(name), yes_no(not there)
    question = rng.choice(
        ["Is there a {}?", "Is there a {} in the image?", "Is a {} present?", "Does the image contain a {}?"]
    )
    return question.format(name), yes_no(there)


def half_turn(shapes: list[Shape], rng: random.Random) -> Turn:
    """Asks whether a shape lies in one half of the image: this is what keeps places in the features."""
    shape = rng.choice(shapes)
    side = rng.choice(["left", "right", "top", "bottom"])
    offset = (shape.x if side in ("left", "right") else shape.y) - SIZE / 2
    if abs(offset) < 3:
        return colour_turn(shapes, rng)  # too near the line to say
    question = rng.choice(["Is the {} in the {} half?", "Is the {} on the {} side?"])
    name = "shape" if len(shapes) == 1 and rng.random() < 0.5 else shape.kind
    return question.format(name, side), yes_no((offset < 0) == (side in ("left", "top")))


def extreme_turn(shapes: list[Shape], rng: random.Random) -> Turn:
    """Asks what lies furthest to one side."""
    side = rng.choice(["left", "right", "top", "bottom"])
    along_x = side in ("left", "right")
    ordered = sorted(shapes, key=lambda s: s.x if along_x else s.y, reverse=side in ("right", "bottom"))
    gap = abs(ordered[0].x - ordered[1].x) if along_x else abs(ordered[0].y - ordered[1].y)
    if gap < 5:
        return kind_turn(shapes, rng)  # too close to say
    place = f"on the {side}" if along_x else f"at the {side}"
    if rng.random() < 0.5:
        return f"What shape is {place}?", ordered[0].kind
    return f"What color is the shape {place}?", ordered[0].colour


def count_turn(shapes: list[Shape], rng: random.Random) -> Turn:
    """Asks how many shapes there are."""
    return rng.choice(["How many shapes are there?", "How many shapes are in the image?"]), NUMBERS[len(shapes)]


def random_turn(shapes: list[Shape], rng: random.Random) -> Turn:
    """One question and its answer, of a random sort."""
    sorts = [kind_turn, colour_turn, presence_turn, half_turn, extreme_turn if len(shapes) > 1 else count_turn]
    return rng.choices(sorts, weights=[30, 30, 15, 17, 8])[0](shapes, rng)


def make_row(turns: list[Turn], images: list[str]) -> Row:
    """A chat whose first message carries the images."""
    messages = []
    for i, (question, answer) in enumerate(turns):
        prefix = "<image>" * len(images) if i == 0 else ""
        messages.append({"role": "user", "content": prefix + question})
        messages.append({"role": "assistant", "content": answer})
    return {"messages": messages, "images": images}


def distinct_turns(shapes: list[Shape], rng: random.Random, count: int) -> list[Turn]:
    """Several turns about one image, no question twice."""
    turns: dict[str, str] = {}
    while len(turns) < count:
        question, answer = random_turn(shapes, rng)
        turns.setdefault(question, answer)
    return list(turns.items())


def first_or_second(scenes: list[list[Shape]], names: list[str], rng: random.Random) -> Row | None:
    """A question about two images of one shape each, or None where they do not differ in kind."""
    kinds = [scene[0].kind for scene in scenes]
    if kinds[0] == kinds[1]:
        return None
    answer = rng.choice([0, 1])
    question = f"Which image shows a {kinds[answer]}, the first or the second?"
    return make_row([(question, ("first", "second")[answer])], names)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_pretraining(folder: Path, images: int, seed: int = 0) -> tuple[Path, Path]:
    """Two files of rows: easy ones to learn to see from, and all sorts.

    The easy rows ask for the shape or the colour where there is only one shape. Among the others each image has
    two chats, one of a single turn and one of three; some chats are about two images.
    """
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    easy: list[Row] = []
    rows: list[Row] = []
    singles: list[tuple[list[Shape], str]] = []
    for i in range(images):
        shapes = random_scene(rng, rng.choices([1, 2, 3], weights=[65, 25, 10])[0])
        name = f"images/{i:05d}.png"
        draw(shapes, rng).save(folder / name)
        rows.append(make_row(distinct_turns(shapes, rng, 1), [name]))
        rows.append(make_row(distinct_turns(shapes, rng, 3), [name]))
        if len(shapes) == 1:
            singles.append((shapes, name))
            # Shapes are much harder to learn than colours, so they are asked for more often.
            turn = rng.choices([kind_turn, colour_turn], weights=[65, 35])[0](shapes, rng)
            easy.append(make_row([turn], [name]))
    for _ in range(images // 8):
        (scene_a, name_a), (scene_b, name_b) = rng.sample(singles, 2)
        row = first_or_second([scene_a, scene_b], [name_a, name_b], rng)
        rows += [row] if row else []
    rng.shuffle(rows)
    write_rows(folder / "easy.jsonl", easy)
    write_rows(folder / "all.jsonl", rows)
    return folder / "easy.jsonl", folder / "all.jsonl"


def write_held_out(path: Path, images: int, seed: int = 1) -> Path:
    """Single-turn open questions about images of their own, with one to three shapes."""
    rng = random.Random(seed)
    (path.parent / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(images):
        shapes = random_scene(rng, rng.choices([1, 2, 3], weights=[55, 30, 15])[0])
        name = f"images/held_out_{i:04d}.png"
        draw(shapes, rng).save(path.parent / name)
        rows.append(make_row([rng.choice([kind_turn, colour_turn])(shapes, rng)], [name]))
    write_rows(path, rows)
    return path


def write_quickstart(folder: Path, train: int = 600, held_out: int = 96, seed: int = 2) -> None:
    """Images of one shape to describe, as in "a teal circle"; no chat of the pretraining asks for this. The same once
    more as pairs of image and text."""
    rng = random.Random(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for split, count in (("train", train), ("eval", held_out)):
        rows: list[Row] = []
        captions: list[dict[str, str]] = []
        for i in range(count):
            shapes = random_scene(rng, 1)
            name = f"images/{split}_{i:03d}.png"
            draw(shapes, rng).save(folder / name)
            answer = f"a {shapes[0].colour} {shapes[0].kind}"
            rows.append(make_row([(rng.choice(QUICKSTART_QUESTIONS), answer)], [name]))
            captions.append({"image": name, "text": answer})
        write_rows(folder / f"{split}.jsonl", rows)
        write_rows(folder / f"captions_{split}.jsonl", captions)


# Ordinary English for the tokenizer, so that common words outside the questions are few tokens as well.
ENGLISH = """
Hello! How are you today? I am fine, thank you. What can I help you with?
The quick brown fox jumps over the lazy dog. She sells sea shells by the sea shore.
I would like to know what is shown in this picture. Please look at it carefully and tell me what you can see.
There is a small house near the river, and behind the house there are three tall trees and a stone wall.
A man is walking along the street with his dog while two children are playing with a ball in the garden.
Could you please explain why the sky is blue? Because the air scatters blue light more than red light.
In the first picture you can see a cat; in the second picture there is a dog. Which one do you like better?
Yes, I think so. No, I do not think that is right. Maybe we should try again with another example.
The train leaves at 7:45 in the morning and arrives at 10:30, so the journey takes about three hours.
Write a short story about a young girl who finds an old map in the library of her school.
Once upon a time there was a king who had everything he wanted, but he was never happy with what he had.
My favourite food is rice with vegetables, but my brother likes bread, cheese, fruit and chocolate.
The capital of France is Paris, the capital of Germany is Berlin, and the capital of Japan is Tokyo.
This chart shows the number of people who visited the museum each month between 2015 and 2024.
The value rises from 12 in January to 48 in June and then falls to 30 at the end of the year.
A flag with three horizontal stripes of green, white and orange; the middle stripe has a blue wheel.
You are a helpful assistant. Answer the question with one word. Describe the image in detail.
If you have any questions about the result, let me know and I will be glad to answer them.
To make the cake you need two eggs, a cup of sugar, some flour, butter and milk. Mix them together well.
Open the file, read each line, count the words and print the total number at the end of the program.
The model was trained on images and text. It learns to give the right answer after a few hundred steps.
He said that they would come back tomorrow, but nobody knows where they are going or when they will return.
What time is it? It is half past nine. What day is it? It is Monday, the twenty-first of October.
She took the large red book from the table, opened it at page one hundred, and began to read aloud.
On the left there is a black bicycle, on the right a yellow car, and in the middle a big white truck.
The numbers are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 25, 64, 100, 128, 512, 1000 and 2048.
Water boils at 100 degrees and freezes at 0 degrees. The temperature outside is 18.5 degrees now.
Thank you very much for your help; I really appreciate it. You're welcome! Don't forget to write.
We've been working on this problem for weeks, and it's still not clear what's going wrong or how to fix it.
First, check whether the picture exists. Second, make sure that it can be opened. Finally, show it on the wall.
Every word counts. Some people believe that small things make the greatest difference in the long run.
The doctor looked at the blood sample and counted seven red cells, two white cells and one that was unclear.
Please translate this sentence into Spanish, French or Chinese, and say how it should be spoken.
Here is a list of things you could do: go swimming, visit a friend, read a newspaper, or learn to play music.
def main(): print("hello world"); for i in range(10): total += i; return {"name": "value", "list": [1, 2]}
"""

if __name__ == "__main__":
    write_quickstart(Path(sys.argv[1]))
