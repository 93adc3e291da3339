"""Samples that cannot be used: each named by file and line with the reason, before the first step."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmtrain.config.schema import Config
from mmtrain.dataset.batch import Loader
from mmtrain.encoding.encode import Encoder
from mmtrain.encoding.load import load_processor
from mmtrain.errors import UserError
from mmtrain.records.record_set import RecordSet
from mmtrain.train.run import train
from support.builders import SHAPES, TINY, make_text, write_jsonl
from support.family_reference import directory
from support.fresh_samples import FreshSamples

PAD = "<|image_pad|>"
IMAGE = sorted((SHAPES / "images").iterdir())[0]


def chat(question: str, answer: str, images: list[str] | None = None, role: str = "user") -> dict[str, Any]:
    messages = [{"role": role, "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages} | ({"images": images} if images is not None else {})


FAULTY: dict[int, tuple[Any, str]] = {
    2: (chat("<image><image>What?", "this", ["ok.png"]), "2 <image> marks but 1 image"),
    3: (chat("<image>What?", "this", ["missing.png"]), "No such file"),
    4: (chat("<image>What?", "this", ["notes.txt"]), "not an image of a known kind"),
    5: (chat("What?", "this", role="narrator"), "unknown role 'narrator'"),
    6: (chat("What?", ""), "an assistant turn without text"),
    7: (chat("What?", "word " * 300), "tokens, over the 200 allowed (data.max_length)"),
    9: ("{not json", "not JSON"),
    10: (chat("<image>What?", "this", ["short.jpg"]), "does not decode"),
    11: (chat("<image>What?", "this", ["short.png"]), "does not decode"),
    12: (chat("<image>What?", "this", ["../outside.png"]), "leaves"),
}


def write_faulty(folder: Path) -> Path:
    """Ten faults among good lines; line 8 is blank."""
    folder.mkdir()
    image = IMAGE.read_bytes()
    (folder / "ok.png").write_bytes(image)
    (folder / "notes.txt").write_text("these are notes")
    (folder / "short.png").write_bytes(image[: len(image) // 2])
    import PIL.Image

    PIL.Image.open(IMAGE).convert("RGB").resize((200, 200)).save(folder / "whole.jpg")
    jpeg = (folder / "whole.jpg").read_bytes()
    (folder / "short.jpg").write_bytes(jpeg[: len(jpeg) * 2 // 3])
    (folder.parent / "outside.png").write_bytes(image)
    lines = []
    for number in range(1, 14):
        record = FAULTY.get(number, (chat("<image>What?", "this", ["ok.png"]), ""))[0]
        lines.append("" if number == 8 else record if isinstance(record, str) else json.dumps(record))
    path = folder / "data.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_every_fault_is_named_before_the_first_step(tmp_path: Path) -> None:
    data = write_faulty(tmp_path / "data")
    config = Config.model_validate(
        {
            "model": {"path": str(TINY), "dtype": "float32"},
            "data": {"train": [{"path": str(data)}], "max_length": 200},
            "train": {"steps": 1},
            "run": {"output_dir": str(tmp_path / "run")},
        }
    )
    with pytest.raises(UserError) as refused:
        train(config)
    *faults, advice = refused.value.faults
    assert advice.startswith("data.on_fault: 9 of 12 samples have faults: correct them, or set it to skip")
    for (number, (_, reason)), fault in zip(FAULTY.items(), faults, strict=True):
        assert fault.startswith(f"{data}:{number}: ")
        assert reason in fault
        assert "\n" not in fault
    assert not (tmp_path / "run").exists()


def test_an_image_that_breaks_later_is_named_at_its_step(make_config: Callable[..., Config]) -> None:
    config = make_config("qwen2_5_vl")
    encoder = Encoder(load_processor(config.model.path))
    samples = FreshSamples(RecordSet(config.data.train), encoder)
    data = Path(config.data.train[0].path)
    image = data.parent / "images" / "0.png"
    whole = bytearray(image.read_bytes())
    middle = len(whole) // 2
    whole[middle : middle + 20] = bytes(20)  # the header and the end are as they were
    image.write_bytes(whole)
    samples.encoded(0)
    with pytest.raises(UserError, match=r"mixed\.jsonl:1: the image 'images/0.png' does not decode"):
        list(Loader(samples, samples.encoder.processor, True).batches([[1], [4, 0]]))


@pytest.mark.parametrize("packing", [True, False])
def test_an_image_that_changed_its_size_is_refused_with_both_sizes(
    packing: bool, make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    import PIL.Image

    from mmtrain.dataset import image_process

    config = make_config("qwen2_5_vl")
    samples = FreshSamples(RecordSet(config.data.train), Encoder(load_processor(config.model.path)))
    monkeypatch.setattr(image_process, "decode", lambda image: PIL.Image.new("RGB", (160, 160)))
    with pytest.raises(UserError, match=r"mixed\.jsonl:1: .*16 tokens were laid out .* makes 100"):
        Loader(samples, samples.encoder.processor, packing).load([1, 0])


def test_samples_that_only_together_cannot_be_laid_out_are_all_named(
    make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config("qwen2_5_vl")
    processor = load_processor(config.model.path)
    samples = FreshSamples(RecordSet(config.data.train), Encoder(processor))
    assert processor.images is not None
    lay_out = processor.images.inputs

    def of_one_alone(images_of: list[list[Any]], ids: Any = None, raw: bool = False) -> Any:
        inputs, laid_out = lay_out(images_of, ids, raw)
        return inputs, laid_out if len(images_of) == 1 else laid_out[1:]

    monkeypatch.setattr(processor.images, "inputs", of_one_alone)
    assert Loader(samples, samples.encoder.processor, True).load([0]).segments
    with pytest.raises(
        UserError, match=r"mixed\.jsonl:1, .*mixed\.jsonl:2, .*mixed\.jsonl:6: the samples cannot be laid"
    ):
        Loader(samples, samples.encoder.processor, True).load([0, 1, 5])


def test_images_for_a_model_without_them_are_refused(make_config: Callable[..., Config], tmp_path: Path) -> None:
    (tmp_path / "ok.png").write_bytes(IMAGE.read_bytes())
    data = write_jsonl(tmp_path / "data.jsonl", [chat("<image>What?", "this", ["ok.png"])])
    config = make_config("text")
    changed = config.model_dump() | {"data": {"train": [{"path": str(data)}]}}
    with pytest.raises(UserError, match=r"data\.jsonl:1: the sample has images and this model takes none"):
        train(Config.model_validate(changed))


def test_a_tokenizer_that_does_not_give_back_text_is_refused(tmp_path: Path) -> None:
    path = make_text(tmp_path / "model")
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {token: id_ for token, id_ in tokenizer["model"]["vocab"].items() if id_ < 12}
    tokenizer["model"]["merges"] = []
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=r"model: .*tokenizer"):
        load_processor(str(path))


def test_a_template_that_prints_the_date_prints_a_fixed_one(tmp_path: Path) -> None:
    path = make_text(tmp_path / "model")
    template = (path / "chat_template.jinja").read_text()
    (path / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}" + template)
    said = load_processor(str(path)).template.render([{"role": "user", "content": [{"type": "text", "text": "hello"}]}])
    assert said.startswith("01 Jan 2025<|im_start|>")


@pytest.mark.parametrize(
    ("file", "before", "after", "reason"),
    [
        ("chat_template.jinja", PAD, "[picture]", f"writes no placeholder '{PAD}' for an image: expected one"),
        ("chat_template.jinja", PAD, f"{PAD} {PAD}", f"writes 2 placeholders '{PAD}' for an image: expected one"),
        (
            "config.json",
            '"image_token_id": ',
            '"image_token_id": 1',
            f"no placeholder '{PAD}': it is token [0-9]+ of the",
        ),
    ],
)
def test_a_placeholder_that_does_not_stand_for_one_image_is_refused(
    file: str, before: str, after: str, reason: str, make_config: Callable[..., Config], tmp_path: Path
) -> None:
    path = Path(shutil.copytree(make_config("qwen2_5_vl").model.path, tmp_path / "model"))
    text = (path / file).read_text()
    assert before in text
    (path / file).write_text(text.replace(before, after))
    with pytest.raises(UserError, match=reason.replace("|", "[|]")):
        load_processor(str(path))


def test_a_tokenizer_that_splits_the_placeholder_is_refused(tmp_path: Path) -> None:
    path = Path(shutil.copytree(directory("qwen3_vl"), tmp_path / "model"))
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [one for one in tokenizer["added_tokens"] if one["content"] != PAD]
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=r"the tokenizer splits the placeholder '<[|]image_pad[|]>' into 13 tokens"):
        load_processor(str(path))
