"""Greedy answers of a Qwen2.5-VL model to single-turn questions about images, and how many are right.

    python scripts/tiny_vlm/answers.py MODEL_DIR DATA [--adapter DIR] [--swap] [--show N] [--seen TRAIN]

DATA is JSON or JSON Lines of ``messages`` + ``images`` rows or LLaVA ``conversations`` + ``image`` rows. The
first question is asked and the first answer is the reference; an answer is right when it equals the reference.
``--swap`` gives each question another row's image: a model that looks must then fall to the blind rate.
"""

from __future__ import annotations

import argparse
import json
import random
import warnings
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.utils.logging import disable_progress_bar

from mmtrain.errors import UserError
from mmtrain.model.adapter import load_adapter, read_adapter

IMAGE = "<|image_pad|>"


@dataclass
class Question:
    """A question, the reference answer and the images it is about."""

    text: str
    answer: str
    images: list[Path]


def read_questions(path: Path) -> list[Question]:
    """The first turn of each row; image paths are relative to the file."""
    content = path.read_text(encoding="utf-8")
    rows = json.loads(content) if path.suffix == ".json" else [json.loads(x) for x in content.splitlines() if x.strip()]
    questions = []
    for row in rows:
        if "messages" in row:
            chat = [m["content"] for m in row["messages"] if m["role"] != "system"]
            images = row["images"]
        else:
            chat, images = [m["value"] for m in row["conversations"]], [row["image"]]
        questions.append(Question(chat[0].replace("<image>", "").strip(), chat[1], [path.parent / i for i in images]))
    return questions


def swap_images(questions: list[Question], seed: int = 0) -> list[Question]:
    """The same questions with the images moved round a random circle, so that no row keeps its own."""
    order = list(range(len(questions)))
    random.Random(seed).shuffle(order)
    moved = list(questions)
    for here, there in zip(order, order[1:] + order[:1], strict=True):
        moved[here] = Question(questions[here].text, questions[here].answer, questions[there].images)
    return moved


def blind_rate(questions: list[Question], seen: list[Question] | None = None) -> float:
    """The share right when each question always gets the answer it most often has among the seen questions.

    This is the best that can be done without looking. Without ``seen`` the answers of ``questions`` themselves
    are counted, which flatters the blind answer where a question is rare.
    """
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    overall = Counter(q.answer for q in seen or questions)
    for q in seen or questions:
        by_text[q.text][q.answer] += 1
    return sum((by_text.get(q.text) or overall).most_common(1)[0][0] == q.answer for q in questions) / len(questions)


class Answerer:
    """A model, its tokenizer and its image processor; the joint processor class would need torchvision."""

    def __init__(self, model_dir: Path, adapter: Path | None = None) -> None:
        disable_progress_bar()
        # peft calls transformers by a name that is going away: nothing a reader of the answers can act on
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        self.tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left", local_files_only=True)
        self.processor = AutoImageProcessor.from_pretrained(model_dir, backend="pil", local_files_only=True)
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            model_dir, dtype=torch.float32, local_files_only=True
        )
        if adapter is not None:
            model = load_adapter(model, read_adapter(adapter))
        self.model = model.eval()

    def prompt(self, question: Question, counts: list[int]) -> str:
        """The chat up to the answer, with one placeholder for each token of each image."""
        content = [{"type": "image"}] * len(counts) + [{"type": "text", "text": question.text}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        pieces = text.split(IMAGE)
        return "".join(piece + IMAGE * n for piece, n in zip(pieces, [*counts, 0], strict=True))

    @torch.no_grad()
    def answer(self, questions: list[Question], max_new_tokens: int = 32) -> list[str]:
        """The greedy answers to one batch of questions."""
        pictures = [Image.open(path).convert("RGB") for q in questions for path in q.images]
        inputs = dict(self.processor(images=pictures, return_tensors="pt")) if pictures else {}
        sizes = iter((inputs["image_grid_thw"].prod(-1) // self.processor.merge_size**2).tolist() if inputs else [])
        texts = [self.prompt(q, [next(sizes) for _ in q.images]) for q in questions]
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt")
        kinds = (tokens["input_ids"] == self.tokenizer.convert_tokens_to_ids(IMAGE)).int()
        made = self.model.generate(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            mm_token_type_ids=kinds,
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        new = made[:, tokens["input_ids"].shape[1] :]
        return [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]

    def answer_all(self, questions: list[Question], batch: int = 32) -> list[str]:
        return [text for i in range(0, len(questions), batch) for text in self.answer(questions[i : i + batch])]


def exact_match(questions: list[Question], given: list[str]) -> float:
    """The share of answers that equal their reference."""
    return sum(q.answer.strip() == text for q, text in zip(questions, given, strict=True)) / len(questions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--adapter", type=Path, help="a PEFT adapter to put on the model")
    parser.add_argument("--swap", action="store_true", help="give each question another row's picture")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the first N answers")
    parser.add_argument("--seen", type=Path, help="training data, to find the best blind answers from")
    args = parser.parse_args()
    questions = read_questions(args.data)
    asked = swap_images(questions) if args.swap else questions
    try:
        answerer = Answerer(args.model, args.adapter)
    except UserError as error:
        parser.error(str(error))
    given = answerer.answer_all(asked)
    for q, text in list(zip(asked, given, strict=True))[: args.show]:
        mark = "right" if text == q.answer.strip() else "wrong"
        print(f"{q.images[0].name if q.images else '-'}  {q.text}  ->  {text}  ({mark}; reference: {q.answer})")
    right = exact_match(asked, given)
    blind = blind_rate(questions, read_questions(args.seen) if args.seen else None)
    print(
        f"right {right:.3f} of {len(questions)}, best blind answer {blind:.3f}"
        + (", pictures swapped" if args.swap else "")
    )


if __name__ == "__main__":
    main()
