"""Makes the tiny vision-language model of data_samples/tiny-vlm from scratch.

    python scripts/tiny_vlm [TARGET] [--work FOLDER] [--scale X]

Draws images of coloured shapes and writes questions about them, trains a small tokenizer, writes a Qwen2.5-VL
with random weights, trains every component of it with ``mmtrain train``, first on easy questions, then on all, and
copies the result to TARGET. Then it prints how often the answers are right on held-out images: with the right
images, with the images swapped, and for the best answer from the question alone. Everything is seeded.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_vlm import data
from tiny_vlm.tokenizer import VOCABULARY, make_tokenizer, write_json

SAMPLES = Path(__file__).resolve().parents[2] / "data_samples"
APACHE = SAMPLES / "licenses" / "Apache-2.0.txt"
SHAPES = SAMPLES / "shapes"
LARGEST_BYTES = 8_000_000
NUM_IMAGES = 16_000
# The phases of the training: data, optimizer steps and learning rate. Colours take a few hundred steps, shapes
# only after a long plateau, so the easy questions come first and the rate is raised again once.
PHASES = (("easy", 1000, 2e-3), ("easy", 800, 1.5e-3), ("all", 700, 7e-4))

NOTICE = """The weights, the tokenizer and the configuration in this folder were made by scripts/tiny_vlm
and have the licence of this project. They were trained on images that the project draws and on easy-VQA (MIT,
see data_samples/shapes/LICENSE).

chat_template.jinja is the chat template of Qwen2.5-VL-7B-Instruct, Copyright Alibaba Cloud, under the Apache
License, Version 2.0; the text of that licence is in LICENSE-Apache-2.0.txt.
"""


def make_data(work: Path) -> dict[str, list[Path]]:
    """Draws the images and returns the training files, each list with easy-VQA's next to the project's own."""
    easy, everything = data.write_pretraining(work / "drawn", NUM_IMAGES)
    data.write_held_out(work / "held_out" / "held_out.jsonl", 400)
    open_questions("test.json", work / "open.json")
    easy_files = [easy, open_questions("train.json", work / "open_train.json")]
    shapes = [SHAPES / name for name in ("train.json", "train_multiturn.jsonl", "train_two_images.jsonl")]
    return {"easy": easy_files, "all": [*easy_files, everything, *shapes]}


def open_questions(name: str, target: Path) -> Path:
    """Writes a file of easy-VQA's without the questions answered by yes or no."""
    rows = json.loads((SHAPES / name).read_text(encoding="utf-8"))
    rows = [row for row in rows if row["conversations"][1]["value"] not in ("yes", "no")]
    for row in rows:
        row["image"] = str(SHAPES / row["image"])
    write_json(target, rows)
    return target


def corpus(work: Path) -> Iterator[str]:
    """The text that the tokenizer is trained on: plain English and a share of the questions and answers."""
    yield APACHE.read_text(encoding="utf-8")
    for _ in range(3):  # weighs the everyday text against the licence
        yield data.ENGLISH
    quickstart = SAMPLES / "quickstart" / "train.jsonl"
    for path in (work / "drawn" / "all.jsonl", quickstart):
        for line in path.read_text(encoding="utf-8").splitlines()[:600]:
            for message in json.loads(line)["messages"]:
                yield message["content"].replace("<image>", "")


def make_random_model(target: Path) -> None:
    """Qwen2.5-VL's architecture in small sizes with random weights, and its image processor's settings."""
    ids = AutoTokenizer.from_pretrained(target).convert_tokens_to_ids
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.08,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": ids("<|endoftext|>"),
        "eos_token_id": ids("<|im_end|>"),
        "pad_token_id": ids("<|endoftext|>"),
    }
    vision = {
        "depth": 4,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_heads": 4,
        "patch_size": 8,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 64,
        "fullatt_block_indexes": [1, 3],
        "out_hidden_size": 128,
        "hidden_act": "silu",
        "initializer_range": 0.08,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=True,
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(target)
    write_json(
        target / "generation_config.json",
        {
            "bos_token_id": ids("<|endoftext|>"),
            "pad_token_id": ids("<|endoftext|>"),
            "eos_token_id": [ids("<|im_end|>"), ids("<|endoftext|>")],
            "do_sample": False,
        },
    )
    # One token stands for 16 x 16 pixels: 16 tokens for an image of 64 x 64, never more than 256.
    write_json(
        target / "preprocessor_config.json",
        {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
            "min_pixels": 64 * 64,
            "max_pixels": 256 * 256,
            "patch_size": 8,
            "temporal_patch_size": 2,
            "merge_size": 2,
            "image_mean": [0.48145466, 0.4578275, 0.40821073],
            "image_std": [0.26862954, 0.26130258, 0.27577711],
        },
    )


def source(file: Path) -> dict[str, str]:
    """A data source; easy-VQA's images are where they ship, wherever the file is."""
    return {"path": str(file)} | ({"root": str(SHAPES)} if file.name.startswith("open") else {})


def train(work: Path, name: str, model: Path, files: list[Path], steps: int, learning_rate: float) -> Path:
    """Trains every part with mmtrain and returns the folder of the trained model."""
    output = work / name
    config = {
        "model": {"path": str(model), "dtype": "float32"},
        "tune": {part: {"mode": "full"} for part in ("vision", "projector", "language")},
        "data": {
            "train": [source(file) for file in files],
            "eval": [
                {**source(work / "open.json"), "name": "easy-vqa"},
                {"path": str(work / "held_out" / "held_out.jsonl"), "name": "drawn"},
            ],
            "max_length": 1024,
        },
        "train": {
            "steps": steps,
            "batch_size": 32,
            "learning_rate": learning_rate,
            "weight_decay": 0.0,
            "schedule": "cosine",
            "warmup_steps": 40,
            "max_grad_norm": 1.0,
            "seed": 0,
        },
        "run": {
            "output_dir": str(output),
            "microbatch_tokens": 4096,
            "packing": False,  # the samples are of nearly one length: padding costs less than a long row
            "checkpoint_every": 200,
            "eval_every": 200,
        },
    }
    write_json(work / f"{name}.yaml", config)  # JSON is YAML too
    subprocess.run([sys.executable, "-m", "mmtrain", "train", str(work / f"{name}.yaml")], check=True)
    return output / "model"


def publish(trained: Path, random_model: Path, target: Path) -> None:
    """Puts the trained weights next to the small files, adds the licences and checks the size of the whole."""
    target.mkdir(parents=True, exist_ok=True)
    Qwen2_5_VLForConditionalGeneration.from_pretrained(trained, dtype=torch.float32).save_pretrained(target)
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "preprocessor_config.json",
        "generation_config.json",
    ):
        shutil.copyfile(random_model / name, target / name)
    (target / "NOTICE").write_text(NOTICE, encoding="utf-8")
    shutil.copyfile(APACHE, target / "LICENSE-Apache-2.0.txt")
    (target / "model.safetensors").chmod(0o644)  # it is written for its owner alone
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    print(f"{target}: {size / 1e6:.2f} MB")
    assert size <= LARGEST_BYTES, size


def evaluate(model: Path, work: Path) -> None:
    """Prints how good the answers about held-out images are, next to blind guessing and to other images."""
    sources = [
        {"path": str(work / "open.json"), "root": str(SHAPES), "name": "easy-VQA, open questions"},
        {"path": str(SHAPES / "test.json"), "name": "easy-VQA, all questions"},
        {"path": str(work / "held_out" / "held_out.jsonl"), "name": "drawn, open questions"},
    ]
    config = {
        "model": {"path": str(model), "dtype": "float32"},
        "data": {"train": [{"path": str(SHAPES / "train.json")}], "eval": sources},
        "run": {"output_dir": str(work / "evaluated")},
    }
    write_json(work / "evaluate.yaml", config)  # JSON is YAML too
    subprocess.run([sys.executable, "-m", "mmtrain", "eval", "answers", str(work / "evaluate.yaml")], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, nargs="?", default=SAMPLES / "tiny-vlm", help="where the model goes")
    parser.add_argument("--work", type=Path, default=Path("tiny-vlm-work"), help="folder for all that is in between")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the optimizer steps of each phase")
    args = parser.parse_args()
    start = time.monotonic()
    work, random_model = args.work.resolve(), args.work.resolve() / "random"
    files = make_data(work)
    make_tokenizer(random_model, corpus(work))
    make_random_model(random_model)
    trained = random_model
    for number, (source, steps, rate) in enumerate(PHASES, 1):
        trained = train(work, f"phase_{number}", trained, files[source], max(1, round(steps * args.scale)), rate)
    publish(trained, random_model, args.target)
    evaluate(args.target, work)
    print(f"made in {(time.monotonic() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
