"""Hostile and broken files through the command line: no traceback, no hang, and memory within bounds."""

import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from support.builders import SHARED, TINY, write_jsonl
from support.label_models import TEMPLATES, make_directory
from test_model_directories import BOMBS

pytestmark = pytest.mark.slow("hundreds of hostile configs, records and images through every command")

BAD = SHARED / "bad_inputs"
PEAK_BYTES = 1.5e9
GOOD = {"messages": [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "red"}]}

Case = tuple[str, list[str]]


def with_image(name: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": "<image>what?"}, {"role": "assistant", "content": "red"}]
    return {"messages": turns, "images": [name]}


def sweep(planned: list[Case]) -> dict[str, Any]:
    """What became of each case; all of them ended by themselves, without a traceback and within the memory."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("support") / "hostile_driver.py")],
        input=json.dumps([{"name": name, "words": words} for name, words in planned]),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr  # libtiff prints there by itself
    found = json.loads(done.stdout)
    assert len(found["cases"]) == len(planned)
    assert found["peak_bytes"] < PEAK_BYTES
    for name, case in found["cases"].items():
        assert case["code"] is not None, f"{name} hangs"
        assert "Traceback" not in case["err"], f"{name}: {case['err']}"
        assert case["code"] in (0, 1, 2, 4), f"{name}: {case}"
        lines = case["err"].splitlines()
        assert all(line.isprintable() for line in lines), f"{name}: {case['err']!r}"
    cases: dict[str, Any] = found["cases"]
    return cases


@pytest.fixture
def config(tmp_path: Path) -> Path:
    data = write_jsonl(tmp_path / "good" / "good.jsonl", [GOOD])
    path = tmp_path / "config.yaml"
    path.write_text(
        f"model: {{path: {TINY}, dtype: float32}}\n"
        f"data: {{train: [{{path: {data}}}]}}\n"
        "train: {steps: 1, batch_size: 1}\n"
        f"run: {{output_dir: {tmp_path / 'run'}}}\n"
    )
    return path


def audit(config: Path, name: str, data: Path | str, *more: str) -> Case:
    return name, ["inspect-labels", str(config), f"data.train.0.path={data}", "--all", *more]


def big_png(path: Path, width: int, height: int) -> None:
    """A PNG of one colour, written by hand: it is small on the disk however many pixels it has."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = b"\0" + bytes(3 * width)
    pixels = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of images that cost more than they look, or are none."""
    folder = tmp_path / "images"
    folder.mkdir()
    os.mkfifo(folder / "fifo.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "folder.png").mkdir()
    (folder / "header.ppm").write_bytes(b"P6 9999 9999 255\n")
    big_png(folder / "large.png", 9950, 9950)
    big_png(folder / "largest that is read.png", 8000, 6200)
    PIL.Image.new("RGB", (30, 30), "red").save(folder / "line\nbreak\x1b[31m.png")
    return folder


def test_images_that_are_no_images(config: Path, images: Path) -> None:
    names = [path.name for path in sorted(images.iterdir())]
    data = write_jsonl(
        images / "data.jsonl", [GOOD, *map(with_image, [*names, "no\x07such.png", "/etc/passwd", "a\0b"])]
    )
    found = sweep([audit(config, "audit", data), ("train", ["train", str(config), f"data.train.0.path={data}"])])
    assert [case["code"] for case in found.values()] == [1, 2]
    sound = {"line\nbreak\x1b[31m.png", "largest that is read.png"}
    refused = [2 + i for i, name in enumerate(names) if name not in sound] + [len(names) + 2 + i for i in range(3)]
    assert all(f"data.jsonl:{line}" in found["audit"]["out"] for line in refused)


@pytest.mark.skipif(not BAD.exists(), reason="the bad files are not here")
def test_every_bad_image_is_read_or_refused(config: Path, tmp_path: Path) -> None:
    rows = json.loads((BAD / "expected_pillow.json").read_text())["rows"]
    assert len(rows) > 60
    data = write_jsonl(tmp_path / "bad.jsonl", [with_image(row["file"]) for row in rows])
    root = f"data.train.0.root={BAD}"
    found = sweep(
        [
            audit(config, "audit", data, "--json", root),
            ("train", ["train", str(config), f"data.train.0.path={data}", root]),
        ]
    )
    assert [case["code"] for case in found.values()] == [1, 2]
    reported = [json.loads(line) for line in found["audit"]["out"].splitlines()]
    for row, image in zip(reported, rows, strict=True):
        if image["expected"].startswith("refuse"):
            assert "refused" in row or "faults" in row, image


@pytest.mark.skipif(not BAD.exists(), reason="the bad files are not here")
def test_every_bad_json_file_is_read_or_refused(config: Path, tmp_path: Path) -> None:
    files = sorted((BAD / "json").glob("*.json"))
    assert len(files) > 150
    lines = tmp_path / "lines.jsonl"
    with lines.open("wb") as out:
        for file in files:
            out.write(file.read_bytes().replace(b"\n", b" ").replace(b"\r", b" ") + b"\n")
    model = f"model.path={make_directory(tmp_path / 'model', 'byte_level', TEMPLATES['chatml'].text)}"
    cases = [audit(config, file.name, file, model) for file in files]
    found = sweep([*cases, audit(config, "as lines", lines)])
    assert {case["code"] for name, case in found.items() if name != "as lines"} <= {1, 2}  # none is a chat
    assert found["as lines"]["code"] == 1


def test_data_and_configs_that_are_no_files(config: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    os.mkfifo(folder / "fifo.jsonl")
    (folder / "zero.jsonl").symlink_to("/dev/zero")
    (folder / "zero.json").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    long = {"messages": [{"role": "user", "content": "a" * 70_000_000}, {"role": "assistant", "content": "b"}]}
    write_jsonl(tmp_path / "long.jsonl", [long, long])
    deep = tmp_path / "deep.jsonl"
    deep.write_text("[" * 100_000 + "\n" + '{"messages": ' * 5_000 + "\n")
    cases = [audit(config, path.name, path) for path in sorted(folder.iterdir())]
    cases += [audit(config, "long", tmp_path / "long.jsonl"), audit(config, "deep", deep)]
    cases += [(name, ["inspect-labels", str(tmp_path / name)]) for name in ("fifo.yaml", "zero.yaml", "no.yaml")]
    found = sweep(cases)
    assert {case["code"] for name, case in found.items() if name not in ("long", "deep")} == {2}
    assert found["long"]["code"] == found["deep"]["code"] == 1


def test_model_directories_and_adapters_that_are_hostile(config: Path, tmp_path: Path) -> None:
    cases = []
    for name, template in BOMBS.items():
        path = make_directory(tmp_path / name.replace(" ", "-"), "byte_level", template)
        cases.append((name, ["inspect-labels", str(config), f"model.path={path}"]))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "target_modules": r"(([a-z._0-9]+)+)+$"}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    (adapter / "adapter_model.safetensors").write_bytes(b"\xff" * 100)
    evaluate = ["eval", "perplexity", str(config), f"--data={tmp_path / 'good' / 'good.jsonl'}"]
    cases += [(name, [*evaluate, f"--adapter={tmp_path / name}"]) for name in ("adapter", "run", "good", "nowhere")]
    found = sweep(cases)
    assert {case["code"] for case in found.values()} == {2}


def test_ordinary_mistakes(config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    plain = ["train", str(config)]
    words = {
        "a file as the folder of the run": [*plain, f"run.output_dir={tmp_path / 'file'}"],
        "a folder that cannot be made": [*plain, "run.output_dir=/proc/none"],
        "threads": [*plain, "run.threads=1000000"],
        "a rank": [*plain, "tune.language.mode=lora", "tune.language.rank=100000000"],
        "micro-batches": [*plain, "run.microbatches=10000000"],
        "overrides into a list": [*plain, "data.train.0=5", "data.train.0.path=x"],
        "no sources": [*plain, "data.train=[]"],
        "sources that are no list": [*plain, "data.train=5"],
        "a page into a missing folder": ["inspect-labels", str(config), f"--html={tmp_path / 'none' / 'a.html'}"],
        "a page onto a folder": ["inspect-labels", str(config), f"--html={tmp_path}"],
    }
    found = sweep(list(words.items()))
    assert {case["code"] for case in found.values()} <= {2, 4}
    for name, case in found.items():
        assert len(case["err"].splitlines()) == 1, f"{name}: {case['err']}"
