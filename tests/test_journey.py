"""The journey of a newcomer by the command line: own images, a config, labels, training, answers, a merged model."""

import html
import json
import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from PIL import ImageDraw
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from typer.testing import CliRunner, Result

from mmtrain.cli import app
from mmtrain.config import load_config
from mmtrain.train.run import train
from support.builders import TINY, write_jsonl

FRUITS = {"cherry": (220, 30, 40), "lemon": (240, 220, 40), "plum": (60, 60, 200)}
"""Words that the tiny model does not know, and the colours that stand for them."""
SLOW = "96 steps, and 40 answers of four kinds"


def draw(folder: Path, num: int, seed: int, swapped: bool = False) -> Path:
    """Images of one fruit each, and a data file that asks which; `swapped`: each row has the image of another."""
    rng = random.Random(seed)
    folder.mkdir(parents=True)
    rows, names = [], [f"{i}.png" for i in range(num)]
    for name in names:
        fruit, radius = rng.choice(list(FRUITS)), rng.randint(12, 22)
        x, y = (rng.randint(radius, 64 - radius) for _ in range(2))
        image = PIL.Image.new("RGB", (64, 64), (230, 230, 230))
        box = (x - radius, y - radius, x + radius, y + radius)
        ImageDraw.Draw(image).ellipse(box, fill=FRUITS[fruit])
        image.save(folder / name)
        rows.append({"image": name, "question": "Which fruit is this?", "answer": fruit})
    if swapped:
        rng.shuffle(names)
    return write_jsonl(folder / "data.jsonl", [row | {"image": name} for row, name in zip(rows, names, strict=True)])


def command(*words: object) -> Result:
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, (result.exception, result.stderr)
    return result


def start(swapped: bool, steps: int) -> list[str]:
    """Draw images into the current directory, write the config and look at the labels; gives the words of `train`."""
    draw(Path("train"), 48, seed=1, swapped=swapped)
    draw(Path("test"), 40, seed=2)
    command("init", "--model", TINY, "--data", "train/data.jsonl", "--eval", "test/data.jsonl", "-o", "fruit.yaml")
    command("inspect-labels", "fruit.yaml", "--all")
    command("inspect-labels", "fruit.yaml", "--html", "labels.html")
    page = Path("labels.html").read_text(encoding="utf-8")
    words = re.sub(r"<[^>]*>|\W", "", html.unescape(page))  # each token is an element of its own
    assert "Whichfruitisthis" in words
    assert "data:image/png;base64," in page
    length = [f"train.steps={steps}", "train.epochs=null", "train.warmup_steps=2", "train.learning_rate=5e-3"]
    every = ["run.checkpoint_every=1", "run.eval_every=96", f"run.eval_answers={{samples: 16, every: {steps}}}"]
    return ["fruit.yaml", *length, *every]


def interrupt_at(step: int, words: list[str]) -> None:
    """The run of `words`, killed after a step, before it is saved."""

    def on_step(row: dict[str, Any]) -> None:
        if row["step"] == step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(load_config(Path(words[0]), words[1:]), on_step=on_step)


def answers_of(adapter: str) -> tuple[dict[str, Any], str]:
    """The figures, and the page as text in one line."""
    words = ["eval", "answers", "fruit.yaml", "--adapter", adapter, "--html", "answers.html"]
    printed = one_line(command(*words).stdout)
    row = json.loads(command(*words, "--json").stdout)
    page = one_line(html.unescape(Path("answers.html").read_text(encoding="utf-8")))
    verdict = f"The model {row['verdict']}."
    assert verdict in printed
    assert verdict in page
    return row, printed


def one_line(text: str) -> str:
    return " ".join(text.split())


def greedy_answers(folder: str, rows: list[dict[str, Any]]) -> list[str]:
    """The answers of a model directory, by transformers alone: torchvision, which its AutoProcessor needs, is not
    installed, so the image's placeholders are counted here."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    images = AutoImageProcessor.from_pretrained(folder, backend="pil")
    found = []
    for row in rows:
        pixels = images(PIL.Image.open(Path("test") / row["image"]), return_tensors="pt")
        num = int(pixels["image_grid_thw"].prod()) // images.merge_size**2
        content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        inputs = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * num), return_tensors="pt")
        types = (inputs["input_ids"] == model.config.image_token_id).int()
        ids = model.generate(**inputs, **pixels, mm_token_type_ids=types, max_new_tokens=16, do_sample=False)
        found.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return found


def check_merged(run: str) -> None:
    """The merged model in plain transformers gives the answers that mmtrain gives of the run."""
    command("merge", run, "-o", "merged")
    rows = [json.loads(line) for line in Path("test/data.jsonl").read_text().splitlines()][:6]
    Path("test/six.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command("generate", run, "--data", "test/six.jsonl", "-o", "answers.jsonl", "--max-new-tokens", 16)
    expected = [json.loads(line)["answer"] for line in Path("answers.jsonl").read_text().splitlines()]
    assert greedy_answers("merged", rows) == expected


@pytest.mark.slow("several runs")
def test_the_journey_in_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command with few steps."""
    monkeypatch.chdir(tmp_path)
    words = start(swapped=False, steps=3)
    interrupt_at(2, words)
    resumed = command("train", *words)
    assert "continuing from runs/fruit/checkpoints/step-000001" in resumed.stderr
    assert re.search(r"on data\.jsonl the model (beats|does not beat) blind guessing", resumed.stderr)
    check_merged("runs/fruit")
    assert "Which fruit is this?" in in_browser(Path("runs/fruit/report.html"), tmp_path)


@pytest.mark.slow(SLOW)
def test_a_model_that_looks_says_so_from_the_run_to_plain_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = start(swapped=False, steps=96)
    interrupt_at(40, words)
    assert "on data.jsonl the model beats blind guessing" in command("train", *words).stderr
    row, _ = answers_of("runs/fruit")
    assert row["beats_blind"] is True
    assert row["metrics"]["exact_match"] > 0.9 > row["blind"]["exact_match"] + 0.3
    assert row["base"]["exact_match"] < 0.1
    report = in_browser(Path("runs/fruit/report.html"), tmp_path)
    assert "the model beats blind guessing" in report
    assert "does not beat" not in report
    check_merged("runs/fruit")


@pytest.mark.slow(SLOW)
def test_a_model_trained_on_the_wrong_images_is_said_not_to_beat_blind_guessing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = start(swapped=True, steps=96)
    assert "on data.jsonl the model does not beat blind guessing" in command("train", *words).stderr
    row, printed = answers_of("runs/fruit")
    assert row["beats_blind"] is False
    assert "beats blind" not in printed
    rows = [json.loads(line) for line in Path("runs/fruit/metrics.jsonl").read_text().splitlines()]
    first, *_, last = (one["perplexity"] for one in rows if "eval" in one)
    assert last < 20 < 1000 < first  # which alone looks like a success
    assert "the model does not beat blind guessing" in in_browser(Path("runs/fruit/report.html"), tmp_path)


def in_browser(page: Path, folder: Path) -> str:
    """The text of a page as headless Chromium has it; where there is none, the file's."""
    if shutil.which("chromium") is None:
        return one_line(page.read_text(encoding="utf-8"))
    words = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    words += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    words += [f"--user-data-dir={folder / 'profile'}", "--dump-dom", page.absolute().as_uri()]
    done = subprocess.run(words, capture_output=True, timeout=120, check=True)
    return one_line(html.unescape(done.stdout.decode("utf-8")))
