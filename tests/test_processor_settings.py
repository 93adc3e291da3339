"""`model.image_processor`: what it changes, where it is saved, and what is refused.

The reference is transformers' own image processor in a directory whose file has the setting.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from transformers import AutoImageProcessor

from mmtrain.config.schema import Config, Model
from mmtrain.encoding.directory import copy_processor
from mmtrain.encoding.load import load_processor
from mmtrain.encoding.processor_settings import ProcessorSettings
from mmtrain.encoding.saved_processor import differences, saved_settings
from mmtrain.errors import UserError
from mmtrain.evaluate.models import find_models
from mmtrain.generate.target import find_target, load_evaluated
from mmtrain.merge.command import merge
from mmtrain.model.adapter import say_other_processor
from mmtrain.runtime.processes import Runtime
from mmtrain.train.run import train

QWEN, LARGE = "qwen2_5_vl", (400, 240)
SMALLER = {"max_pixels": 8192}


@pytest.fixture
def image() -> PIL.Image.Image:
    noise = torch.randint(0, 256, (LARGE[1], LARGE[0], 3), generator=torch.Generator().manual_seed(0))
    return PIL.Image.fromarray(noise.to(torch.uint8).numpy())


def _pixels(directory: Path, image: PIL.Image.Image) -> torch.Tensor:
    own = AutoImageProcessor.from_pretrained(directory, backend="pil")
    pixels: torch.Tensor = own(images=[image], return_tensors="pt")["pixel_values"]
    return pixels


def _edited(model: Path, target: Path, nested: bool) -> Path:
    """A copy of a model directory with SMALLER in its file, or with all settings in processor_config.json."""
    shutil.copytree(model, target)
    settings = json.loads((target / "preprocessor_config.json").read_text()) | SMALLER
    if nested:
        (target / "preprocessor_config.json").unlink()
        (target / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    else:
        (target / "preprocessor_config.json").write_text(json.dumps(settings))
    return target


def test_a_setting_counts_as_if_it_stood_in_the_models_file(
    model_dirs: dict[str, Path], tmp_path: Path, image: PIL.Image.Image
) -> None:
    processor = load_processor(str(model_dirs[QWEN]), ProcessorSettings(image_processor=SMALLER))
    inputs, ids = processor.image_inputs([[image]])
    reference = _pixels(_edited(model_dirs[QWEN], tmp_path / "edited", nested=False), image)
    assert torch.equal(inputs["pixel_values"], reference)
    assert len(reference) < len(_pixels(model_dirs[QWEN], image))
    num_placeholders = sum(id_ == processor.image_token_id for id_ in ids)
    assert num_placeholders == len(reference) // 4  # the model joins 2x2 patches in a token


@pytest.mark.parametrize("nested", [False, True])
def test_it_is_saved_where_transformers_reads_it(
    model_dirs: dict[str, Path], tmp_path: Path, image: PIL.Image.Image, nested: bool
) -> None:
    source = _edited(model_dirs[QWEN], tmp_path / "source", nested)
    (tmp_path / "made").mkdir()
    shutil.copyfile(source / "config.json", tmp_path / "made" / "config.json")
    copy_processor(source, tmp_path / "made", None, {"max_pixels": 4096})
    assert len(_pixels(tmp_path / "made", image)) < len(_pixels(source, image))
    found = saved_settings(tmp_path / "made", str(source))
    assert found.image_processor == {"max_pixels": 4096}


def _saved(config: Model, target: Path) -> Path:
    """The processor that a run with the section `config` saves."""
    target.mkdir()
    copy_processor(Path(config.path), target, None, config.image_processor)
    return target


def test_another_processor_than_the_saved_one_is_named(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    plain = Model(path=str(model_dirs[QWEN]))
    smaller = plain.model_copy(update={"image_processor": SMALLER})
    own = json.loads((model_dirs[QWEN] / "preprocessor_config.json").read_text())["max_pixels"]
    saved = _saved(smaller, tmp_path / "saved")
    assert differences(saved, smaller) == []
    assert differences(saved, plain) == [f"model.image_processor.max_pixels was 8192 and is {own}"]
    lines: list[str] = []
    (saved / "adapter_config.json").touch()
    say_other_processor(saved, plain, lines.append)
    assert len(lines) == 1
    assert "max_pixels was 8192" in lines[0]
    AutoImageProcessor.from_pretrained(saved, backend="pil").save_pretrained(tmp_path / "other")  # every key, by size
    assert differences(tmp_path / "other", smaller) == []
    assert len(differences(tmp_path / "other", plain)) == 1
    (tmp_path / "empty").mkdir()
    assert differences(tmp_path / "empty", smaller) == []


def test_another_template_than_the_saved_one_is_named(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    plain = Model(path=str(model_dirs[QWEN]))
    (tmp_path / "other.jinja").write_text("{{ messages[0].content }}")
    given = plain.model_copy(update={"chat_template": str(tmp_path / "other.jinja")})
    saved = _saved(plain, tmp_path / "saved")
    assert differences(saved, plain) == []
    assert differences(saved, given) == ["model.chat_template was another one"]


@pytest.mark.slow("a run")
def test_evaluation_uses_the_processor_of_the_config(
    make_config: Callable[..., Config], tmp_path: Path, model_dirs: dict[str, Path]
) -> None:
    complete = _edited(model_dirs[QWEN], tmp_path / "complete", nested=False)
    (complete / "preprocessor_config.json").unlink()
    copy_processor(model_dirs[QWEN], complete, None, SMALLER)  # as a run with SMALLER saves it
    config = make_config(QWEN)
    plain, smaller = config.model, config.model.model_copy(update={"image_processor": SMALLER})
    assert find_models([str(complete)], smaller).complete == {str(complete): complete}
    with pytest.raises(UserError, match=r"other tokenizer or processor files .*max_pixels was 8192 and is"):
        find_models([str(complete)], plain)
    for path, settings in ((None, smaller), (complete, smaller), (complete, plain)):
        loaded = load_evaluated(config.model_copy(update={"model": settings}), path, Runtime("float32"))
        assert loaded.encoder.processor.image_settings == settings.image_processor


def test_an_adapter_whose_processor_transformers_saved_has_what_differs(
    model_dirs: dict[str, Path], tmp_path: Path, image: PIL.Image.Image
) -> None:
    """transformers writes every setting, also those that a model's own file leaves to the family."""
    AutoImageProcessor.from_pretrained(model_dirs[QWEN], backend="pil").save_pretrained(tmp_path / "same")
    assert saved_settings(tmp_path / "same", str(model_dirs[QWEN])).image_processor == {}
    other = AutoImageProcessor.from_pretrained(model_dirs[QWEN], backend="pil", do_normalize=False)
    other.save_pretrained(tmp_path / "other")
    found = saved_settings(tmp_path / "other", str(model_dirs[QWEN]))
    assert found.image_processor == {"do_normalize": False}
    processor = load_processor(str(model_dirs[QWEN]), found)
    reference = other(images=[image], return_tensors="pt")["pixel_values"]
    assert torch.equal(processor.image_inputs([[image]])[0]["pixel_values"], reference)


def test_an_adapter_with_another_image_processor_is_refused(model_dirs: dict[str, Path], tmp_path: Path) -> None:
    """`max_pixels` of the model's file decides, so a saved `size` cannot take its place."""
    own = json.loads((model_dirs[QWEN] / "preprocessor_config.json").read_text())
    del own["max_pixels"], own["min_pixels"]
    own["size"] = {"shortest_edge": 4096, "longest_edge": 8192}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(own))
    with pytest.raises(UserError, match=r"its image processor is not that of .*"):
        saved_settings(tmp_path, str(model_dirs[QWEN]))


@pytest.mark.slow("a run, and a merge of what it made")
def test_a_run_and_what_is_made_of_it_keep_it(
    make_config: Callable[..., Config], tmp_path: Path, image: PIL.Image.Image
) -> None:
    config = make_config(QWEN, steps=1, microbatch_tokens=4096)
    config = config.model_copy(update={"model": config.model.model_copy(update={"image_processor": SMALLER})})
    train(config)
    target = find_target(config.run.output_dir)
    processor = load_processor(target.path, target.processor_settings)
    merge(Path(config.run.output_dir), tmp_path / "merged")
    (pixels, _), merged = processor.image_inputs([[image]]), _pixels(tmp_path / "merged", image)
    assert torch.equal(pixels["pixel_values"], merged)
    assert torch.equal(merged, _pixels(_edited(Path(config.model.path), tmp_path / "edited", nested=False), image))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"max_pixel": 8192}, r"has no key 'max_pixel'; did you mean max_pixels\?"),
        ({"device": "cpu"}, r"has no key 'device'; it has .*max_pixels"),
        ({"do_resize": "no"}, r"do_resize: expected true or false, not 'no'"),
        ({"size": {"shortest_edge": 64, "longest_edge": 8192}}, r"size: .* changes nothing: .*max_pixels"),
        ({"max_pixels": "many"}, r"with model\.image_processor\.max_pixels: 'many': .*refuses an image of 64x64"),
    ],
)
def test_what_is_no_setting_is_refused(model_dirs: dict[str, Path], settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        load_processor(str(model_dirs[QWEN]), ProcessorSettings(image_processor=settings))


def test_a_setting_that_does_not_fit_the_model_is_named(make_config: Callable[..., Config]) -> None:
    config = make_config(QWEN)
    model = config.model.model_copy(update={"image_processor": {"merge_size": 1}})
    with pytest.raises(UserError, match=r"on a trial batch: .*; model\.image_processor\.merge_size may not fit the"):
        train(config.model_copy(update={"model": model}))


def test_a_model_without_images_has_no_image_processor(model_dirs: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"model\.image_processor: this model takes no images"):
        load_processor(str(model_dirs["text"]), ProcessorSettings(image_processor=SMALLER))
