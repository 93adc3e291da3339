"""Model directories that are broken or not safe: each refused in one line that names the file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmtrain.encoding.load import load_processor
from mmtrain.errors import UserError
from mmtrain.model.load import length_limit, load_model

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PT = {"format": "pt"}
FIRST = "model-00001-of-00002.safetensors"


@pytest.fixture
def directory(model_dirs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a model to be spoiled."""
    return Path(shutil.copytree(model_dirs["text"], tmp_path / "model"))


@pytest.fixture
def sharded(directory: Path) -> tuple[Path, dict[str, Any]]:
    """The same in two files, and the index that lists them."""
    weights = load_file(directory / SINGLE)
    (directory / SINGLE).unlink()
    names = sorted(weights)
    files = {name: FIRST if i < 5 else "model-00002-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in names if files[name] == file}, directory / file, PT)
    index = {"metadata": {"total_size": 1}, "weight_map": files}
    (directory / INDEX).write_text(json.dumps(index))
    return directory, index


def check_refused(directory: Path, reason: str, capfd: pytest.CaptureFixture[str]) -> None:
    processor = load_processor(str(directory))
    capfd.readouterr()
    with pytest.raises(UserError) as refused:
        load_model(str(directory), "float32", processor)
    (fault,) = refused.value.faults
    assert reason in fault
    assert fault.startswith(str(directory))
    assert fault.isprintable()
    assert capfd.readouterr().err == ""  # no report of transformers next to the line


@pytest.mark.parametrize("size", [0, 7, 100, -1, "half"])
def test_a_cut_weights_file_is_refused(size: Any, directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    content = (directory / SINGLE).read_bytes()
    (directory / SINGLE).write_bytes(content[: len(content) // 2 if size == "half" else size])
    check_refused(directory, "model.safetensors: not a complete safetensors file", capfd)


def test_a_cut_shard_is_refused(sharded: tuple[Path, dict[str, Any]], capfd: pytest.CaptureFixture[str]) -> None:
    directory, _ = sharded
    (directory / FIRST).write_bytes((directory / FIRST).read_bytes()[:-1])
    check_refused(directory, f"{FIRST}: not a complete safetensors file", capfd)


def test_a_sharded_model_is_loaded(sharded: tuple[Path, dict[str, Any]], model_dirs: dict[str, Path]) -> None:
    directory, _ = sharded
    loaded = load_model(str(directory), "float32", load_processor(str(directory))).state_dict()
    expected = load_file(model_dirs["text"] / SINGLE)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.items())


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", f"{INDEX}: not JSON"),
        ("{", f"{INDEX}: not JSON"),
        ("[" * 100_000, f"{INDEX}: not JSON"),
        ("[]", f"{INDEX}: expected an object of keys"),
        ("{}", f"{INDEX}: expected weight_map"),
        ('{"weight_map": {}}', f"{INDEX}: expected weight_map"),
        ('{"weight_map": ["a"]}', f"{INDEX}: expected weight_map"),
        ('{"weight_map": {"a": 3}}', f"{INDEX}: expected weight_map"),
    ],
)
def test_an_index_that_is_not_one_is_refused(
    content: str, reason: str, sharded: tuple[Path, dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    (sharded[0] / INDEX).write_text(content)
    check_refused(sharded[0], reason, capfd)


@pytest.mark.slow("broken files of models, many of each kind")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model-3.safetensors", "'model-3.safetensors' is not there"),
        ("../other/model.safetensors", "is not the name of a safetensors file in the same directory"),
        ("{outside}", "is not the name of a safetensors file in the same directory"),
        ("pytorch_model.bin", "is not the name of a safetensors file in the same directory"),
    ],
)
def test_an_index_that_names_other_files_is_refused(
    name: str,
    reason: str,
    sharded: tuple[Path, dict[str, Any]],
    model_dirs: dict[str, Path],
    capfd: pytest.CaptureFixture[str],
) -> None:
    directory, index = sharded
    shutil.copytree(model_dirs["text"], directory.parent / "other")
    index["weight_map"]["lm_head.weight"] = name.format(outside=model_dirs["text"] / SINGLE)
    (directory / INDEX).write_text(json.dumps(index))
    check_refused(directory, f"{INDEX}: ", capfd)
    check_refused(directory, reason, capfd)


def test_pickled_weights_are_refused(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    weights = load_file(directory / SINGLE)
    (directory / SINGLE).unlink()
    check_refused(directory, "no weights: expected model.safetensors or", capfd)
    torch.save(weights, directory / "pytorch_model.bin")
    check_refused(directory, "only 'pytorch_model.bin', a pickle, which may run code", capfd)


def test_the_directory_of_an_adapter_is_no_base_model(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (directory / "adapter_config.json").write_text("{}")
    check_refused(directory, "give the directory of a base model, not of an adapter", capfd)


def change_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(directory / SINGLE)
    change(weights)
    save_file(weights, directory / SINGLE, PT)


def test_weights_of_other_shapes_are_refused(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change_weights(directory, lambda weights: weights.update({"model.norm.weight": torch.zeros(3, 5)}))
    check_refused(directory, "1 weights have other shapes than config.json requires, such as 'model.norm.w", capfd)
    check_refused(directory, "(3, 5) in the file, (64,) expected", capfd)


def test_missing_weights_are_refused(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change_weights(directory, lambda weights: weights.pop("model.norm.weight"))
    check_refused(directory, "1 weights are missing, such as 'model.norm.weight'", capfd)


def test_weights_that_are_not_used_are_reported_in_one_line(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    change_weights(directory, lambda weights: weights.update(left_over=torch.zeros(3)))
    load_model(str(directory), "float32", load_processor(str(directory)))
    (line,) = caplog.messages
    assert line == f"warning: {directory}: 1 weights are not used by the model, such as 'left_over'"


def change_config(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.slow("broken files of models, many of each kind")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_size": 63}, "weights have other shapes than config.json requires"),
        ({"num_hidden_layers": 3, "layer_types": None}, "weights are missing, such as 'model.layers.2"),
        ({"hidden_act": "os.system"}, "the model cannot be loaded: KeyError: 'os.system'"),
        ({"hidden_size": -1}, "the model cannot be loaded"),
        ({"transformers_weights": "adapter_model.bin"}, "transformers_weights is not supported"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_refused(
    changes: dict[str, Any], reason: str, directory: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change_config(directory, **changes)
    check_refused(directory, reason, capfd)


@pytest.mark.parametrize("component", ["text_config", "vision_config"])
def test_a_component_that_a_config_leaves_out_is_not_made(
    component: str, model_dirs: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By transformers' defaults it has billions of weights, of which all would be reported as missing."""
    directory = Path(shutil.copytree(model_dirs["llava"], tmp_path / "model"))
    change_config(directory, **{component: None})
    check_refused(directory, f"config.json has no {component}: by transformers' defaults the model has", capfd)


@pytest.mark.slow("broken files of models, many of each kind")
@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"model_type": "nope"}', '{"model_type": 3}', '{"model_type": "qwen3", "hidden_size": "x"}'],
)
def test_a_broken_config_is_refused(content: str, directory: Path, model_dirs: dict[str, Path]) -> None:
    processor = load_processor(str(model_dirs["text"]))
    (directory / "config.json").write_text(content)
    for load in (lambda: load_model(str(directory), "float32", processor), lambda: length_limit(str(directory), 9)):
        with pytest.raises(UserError) as refused:
            load()
        (fault,) = refused.value.faults
        assert fault.startswith(f"{directory}: the model's config cannot be loaded: ")
        assert fault.isprintable()
