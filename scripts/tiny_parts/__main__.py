"""Makes two small parts for `mmtrain compose`, on the CPU in a few minutes.

    python scripts/tiny_parts [TARGET]

TARGET/tower is a CLIP with random weights, trained here on drawn images of one shape: of the 24 captions, such as "a
teal circle", the right one must be the most similar (Radford and others 2021, "Learning transferable visual models
from natural language supervision", with each caption once instead of once per image). TARGET/language is the language
model of data_samples/tiny-vlm alone, trained further on text about such images ("green circle", a question or the
request to describe it, the reply), since a language model must be able to write a caption before it is joined to an
encoder. TARGET/text is that run of mmtrain. Everything is seeded.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mmtrain import api
from mmtrain.config import Config
from tiny_vlm import data

TINY = Path(__file__).resolve().parents[2] / "data_samples" / "tiny-vlm"
WIDTH, LAYERS, PATCH = 96, 4, 8
NUM_IMAGES, STEPS, BATCH, RATE = 6_000, 700, 64, 1.5e-3
NUM_TEXTS, TEXT_STEPS = 5_800, 150


def make_language(target: Path, work: Path) -> None:
    """The language model of the tiny model, trained further on text in the folder `work`."""
    cut_language_model(work / "before")
    data.write_rows(work / "text.jsonl", list(text_rows(random.Random(5))))
    config = {
        "model": {"path": str(work / "before"), "dtype": "float32"},
        "tune": {"language": {"mode": "full"}},
        "data": {"train": [str(work / "text.jsonl")]},
        "train": {"steps": TEXT_STEPS, "batch_size": 32, "learning_rate": 1e-3, "warmup_steps": 10},
        "run": {"output_dir": str(work / "run"), "microbatch_tokens": 4096},
    }
    run = api.train(Config.model_validate(config))
    shutil.copytree(run / "model", target, dirs_exist_ok=True)
    for name in ("LICENSE-Apache-2.0.txt", "NOTICE"):
        shutil.copyfile(TINY / name, target / name)


def text_rows(rng: random.Random) -> Iterator[data.Row]:
    """Chats of one turn about an image that is given in words: half of them ask for a caption."""
    for _ in range(NUM_TEXTS):
        scene = data.random_scene(rng, 1)
        colour, kind = scene[0].colour, scene[0].kind
        words = f"{colour} {kind}" if rng.random() < 0.5 else f"{kind} {colour}"
        if rng.random() < 0.5:
            question, answer = rng.choice(data.QUICKSTART_QUESTIONS), f"a {colour} {kind}"
        else:
            question, answer = rng.choice([data.kind_turn, data.colour_turn, data.presence_turn])(scene, rng)
        yield data.make_row([(f"{words}\n{question}", answer)], [])


def cut_language_model(target: Path) -> None:
    """The decoder, head and tokenizer of the tiny model. For text its rotary embeddings are the ordinary ones."""
    whole = Qwen2_5_VLForConditionalGeneration.from_pretrained(TINY).eval()
    settings = whole.config.text_config.to_dict() | {"model_type": "qwen2"}
    settings["rope_parameters"] = {key: settings["rope_parameters"][key] for key in ("rope_type", "rope_theta")}
    alone = Qwen2ForCausalLM(Qwen2Config(**settings)).eval()
    alone.model.load_state_dict(whole.model.language_model.state_dict())
    alone.lm_head.load_state_dict(whole.lm_head.state_dict())
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert torch.allclose(alone(ids).logits, whole(input_ids=ids).logits, atol=1e-4)
    alone.save_pretrained(target)
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(TINY / name, target / name)
    text = (TINY / "tokenizer_config.json").read_text(encoding="utf-8")
    (target / "tokenizer_config.json").write_text(text.replace("Qwen2_5_VLProcessor", ""), encoding="utf-8")


def drawn(rng: random.Random, processor: CLIPImageProcessorPil, count: int) -> tuple[Tensor, Tensor]:
    """(count, 3, 64, 64) pixels of images of one shape, and (count,) the numbers of their captions."""
    scenes = [data.random_scene(rng, 1) for _ in range(count)]
    pixels = processor([data.draw(scene, rng) for scene in scenes], return_tensors="pt")["pixel_values"]
    colours = list(data.COLOURS)
    numbers = [colours.index(scene[0].colour) * len(data.KINDS) + data.KINDS.index(scene[0].kind) for scene in scenes]
    return pixels, torch.tensor(numbers)


def make_tower(target: Path) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    captions = [f"a {colour} {kind}{tokenizer.eos_token}" for colour in data.COLOURS for kind in data.KINDS]
    texts = tokenizer(captions, padding=True, return_tensors="pt")
    small = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_attention_heads": 4, "projection_dim": 64}
    config = CLIPConfig(
        text_config=CLIPTextConfig(
            vocab_size=len(tokenizer),
            num_hidden_layers=1,
            max_position_embeddings=texts["input_ids"].shape[1],
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.pad_token_id,
            **small,
        ).to_dict(),
        vision_config=CLIPVisionConfig(
            image_size=data.SIZE, patch_size=PATCH, num_hidden_layers=LAYERS, hidden_act="gelu", **small
        ).to_dict(),
        projection_dim=64,
    )
    model = CLIPModel(config)
    size = {"height": data.SIZE, "width": data.SIZE}
    processor = CLIPImageProcessorPil(size={"shortest_edge": data.SIZE}, crop_size=size)
    pixels, labels = drawn(random.Random(0), processor, NUM_IMAGES)
    train(model, pixels, labels, texts)
    pixels, labels = drawn(random.Random(1), processor, 500)
    with torch.no_grad():
        right = model(pixel_values=pixels, **texts).logits_per_image.argmax(-1) == labels
    print(f"tower: {right.float().mean():.1%} of 500 new images have the right one of {len(captions)} captions")
    model.save_pretrained(target)
    processor.save_pretrained(target)


def train(model: CLIPModel, pixels: Tensor, labels: Tensor, texts: dict[str, Tensor]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, STEPS + 1):
        chosen = torch.randint(len(pixels), (BATCH,), generator=generator)
        loss = F.cross_entropy(model(pixel_values=pixels[chosen], **texts).logits_per_image, labels[chosen])
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"tower: step {step} of {STEPS}, loss {loss:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, nargs="?", default=Path("runs/compose"), help="folder for both parts")
    args = parser.parse_args()
    start = time.monotonic()
    make_language(args.target / "language", args.target / "text")
    make_tower(args.target / "tower")
    print(f"made {args.target} in {(time.monotonic() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
