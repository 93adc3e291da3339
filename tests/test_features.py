"""Cached features of images: the same losses as from pixels, the same bits whatever was missing, nothing stale."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file

from mmtrain.config.schema import Config
from mmtrain.dataset import image_process
from mmtrain.evaluate.evaluation import ModelScoring
from mmtrain.model.components import Components, is_as_loaded
from mmtrain.scoring.image_cache import caches_features
from mmtrain.train import loop
from mmtrain.train.run import train
from mmtrain.train.step import Learner, train_step
from support.learning import LORA, MIXED, learner_for, relative_l2, step_of

MakeConfig = Callable[..., Config]
OFF = {"memory_gib": 0.0, "disk_gib": 0.0}
DISK = {"memory_gib": 0.0, "disk_gib": 1.0}
ONE, FIVE_THREE, EACH = (
    [[0, 1, 2, 3, 4, 5, 6, 7]],
    [[7, 5, 0, 2, 4], [3, 1, 6]],
    [[n] for n in (3, 7, 6, 0, 1, 2, 5, 4)],
)
LANGUAGE = {"language": LORA}


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture(params=["qwen2_5_vl", "llava"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def folders(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "home" / ".cache" / "mmtrain" / "features").iterdir())


def rows(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.run.output_dir) / "metrics.jsonl").read_text().splitlines()]


def adapter(config: Config) -> bytes:
    return (Path(config.run.output_dir) / "adapter" / "adapter_model.safetensors").read_bytes()


def images(config: Config) -> list[Path]:
    return sorted((Path(config.data.train[0].path).parent / "images").iterdir())


def count_towers(learner: Learner) -> list[int]:
    """A list that grows by one with every call of the vision tower."""
    calls: list[int] = []
    tower = learner.model.get_base_model().get_encoder(modality="image")
    tower.register_forward_hook(lambda *_: calls.append(1))
    return calls


def same_bits(found: tuple[float, dict[str, Any]], expected: tuple[float, dict[str, Any]]) -> bool:
    return found[0] == expected[0] and all(torch.equal(found[1][name], expected[1][name]) for name in expected[1])


@pytest.mark.slow("steps under several settings")
@pytest.mark.parametrize("packing", [True, False])
def test_losses_and_gradients_are_those_from_pixels(family: str, packing: bool, make_config: MakeConfig) -> None:
    plain, dataset = learner_for(make_config(family, LANGUAGE, image_cache=OFF))
    keeping, _ = learner_for(make_config(family, LANGUAGE))
    assert plain.make_inputs.features is None
    assert keeping.make_inputs.features is not None
    for cuts in (ONE, FIVE_THREE, EACH):  # the second and the third from what is kept
        loss, gradients = step_of(plain, dataset, cuts, packing)
        found, found_gradients = step_of(keeping, dataset, cuts, packing)
        assert found == pytest.approx(loss, rel=1e-6)  # measured: 0
        assert relative_l2(found_gradients, gradients) <= 1e-6  # measured: 0


@pytest.mark.slow("two runs per model")
def test_a_run_of_three_epochs_goes_as_from_pixels(family: str, make_config: MakeConfig) -> None:
    settings = {"steps": 6, "batch_size": 4, "microbatch_tokens": 120, "learning_rate": 1e-3}
    found = {}
    for name, features in (("kept", {}), ("on disk", DISK), ("pixels", OFF)):
        config = make_config(family, LANGUAGE, image_cache=features, **settings)
        train(config)
        found[name] = [row["loss"] for row in rows(config)]
        shutil.rmtree(config.run.output_dir)
    assert len(found["pixels"]) == 6
    assert found["kept"] == pytest.approx(found["pixels"], rel=1e-6)
    assert found["on disk"] == found["kept"]


@pytest.mark.slow("steps under several settings")
@pytest.mark.parametrize("features", [{}, DISK])
def test_each_image_goes_through_the_tower_once_and_is_decoded_no_more(
    family: str, features: dict[str, float], make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(family, LANGUAGE, image_cache=features)
    learner, dataset = learner_for(config)
    towers = count_towers(learner)
    shutil.copyfile(images(config)[0], images(config)[3])  # the same image under two names
    step_of(learner, dataset, FIVE_THREE, True)
    assert len(towers) == len({path.read_bytes() for path in images(config)}) == 4
    monkeypatch.setattr(image_process, "decode", lambda image: pytest.fail("decoded again"))
    step_of(learner, dataset, EACH, False)
    assert len(towers) == 4


@pytest.mark.slow("several runs")
def test_the_bits_do_not_depend_on_which_images_were_missing(family: str, make_config: MakeConfig) -> None:
    config = make_config(family, LANGUAGE)
    fresh, dataset = learner_for(config)
    expected = step_of(fresh, dataset, FIVE_THREE, True)  # every image of a micro-batch is missing
    assert same_bits(step_of(fresh, dataset, FIVE_THREE, True), expected)  # and none
    other, _ = learner_for(config)
    step_of(other, dataset, [[0], [5]], True)
    assert same_bits(step_of(other, dataset, FIVE_THREE, True), expected)  # and some


@pytest.mark.slow("several runs per case")
@pytest.mark.parametrize("features", [{}, DISK, {"memory_gib": 1e-5, "disk_gib": 0.0}])
def test_a_stopped_run_continues_to_the_same_bits(
    features: dict[str, float], make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"steps": 6, "batch_size": 4, "checkpoint_every": 1, "microbatch_tokens": 120}
    config = make_config("qwen2_5_vl", LANGUAGE, image_cache={}, **settings)
    train(config)
    whole = adapter(config)
    shutil.rmtree(config.run.output_dir)

    class Stop(Exception):
        pass

    take = train_step

    def die(learner: Any, batches: Any, num_supervised: int, step: int, norm: float | None) -> Any:
        if step == 4:
            raise Stop
        return take(learner, batches, num_supervised, step, norm)

    monkeypatch.setattr(loop, "train_step", die)
    with pytest.raises(Stop):
        train(config)
    monkeypatch.setattr(loop, "train_step", take)
    train(make_config("qwen2_5_vl", LANGUAGE, image_cache=features, **settings))  # other limits are no change
    assert adapter(config) == whole


@pytest.mark.slow("several runs")
def test_a_resume_without_keeping_says_that_bits_may_differ(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"steps": 2, "batch_size": 4, "checkpoint_every": 1}
    config = make_config("llava", LANGUAGE, **settings)
    train(config)
    assert "image cache: on, 2 GiB in memory and 0 GiB on disk" in capsys.readouterr().err
    shutil.rmtree(Path(config.run.output_dir) / "adapter")
    shutil.rmtree(Path(config.run.output_dir) / "checkpoints" / "step-000002")
    train(make_config("llava", LANGUAGE, image_cache=OFF, **settings))
    assert "its bits may differ: image_cache True → False" in capsys.readouterr().err


@pytest.mark.slow("several runs")
@pytest.mark.parametrize("features", [{}, DISK])
def test_an_image_that_is_written_over_is_another_image(
    family: str, features: dict[str, float], make_config: MakeConfig
) -> None:
    config = make_config(family, LANGUAGE, image_cache=features)
    keeping, dataset = learner_for(config)
    before, _ = step_of(keeping, dataset, ONE, True)
    path = images(config)[0]
    with PIL.Image.open(path) as opened:
        size = opened.size
    PIL.Image.effect_noise(size, 90).convert("RGB").save(path)
    after, gradients = step_of(keeping, dataset, ONE, True)
    plain, _ = learner_for(make_config(family, LANGUAGE, image_cache=OFF))
    expected, expected_gradients = step_of(plain, dataset, ONE, True)
    assert after == pytest.approx(expected, rel=1e-6)
    assert relative_l2(gradients, expected_gradients) <= 5e-6
    assert abs(after - before) > 1e-4 * before


@pytest.mark.slow("several runs")
def test_other_weights_or_another_type_have_a_folder_of_their_own(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("llava", LANGUAGE, image_cache=DISK)
    data = config.model_dump()
    model = shutil.copytree(config.model.path, tmp_path / "model")
    data["model"]["path"] = str(model)

    def loss(features: dict[str, float] = DISK) -> float:
        learner, dataset = learner_for(Config.model_validate(data | {"run": data["run"] | {"image_cache": features}}))
        return step_of(learner, dataset, ONE, True)[0]

    before = loss()
    assert len(folders(tmp_path)) == 1
    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if "projector" in name and name.endswith("weight"))
    save_file(weights | {name: weights[name] * 2}, model / "model.safetensors", {"format": "pt"})
    after = loss()
    assert len(folders(tmp_path)) == 2
    assert after == pytest.approx(loss(OFF), rel=1e-6)
    assert abs(after - before) > 1e-4 * before
    data["model"]["dtype"] = "bfloat16"
    loss()
    assert len(folders(tmp_path)) == 3


def test_a_broken_file_is_computed_again(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("llava", LANGUAGE, image_cache=DISK)
    learner, dataset = learner_for(config)
    expected = step_of(learner, dataset, ONE, True)
    towers = count_towers(learner)
    files = sorted(folders(tmp_path)[0].iterdir())
    assert len(files) == 5
    raw = bytearray(files[2].read_bytes())
    raw[-100] ^= 4
    files[2].write_bytes(raw)
    files[3].write_bytes(files[3].read_bytes()[:-50])
    assert same_bits(step_of(learner, dataset, ONE, True), expected)
    assert len(towers) == 2
    assert same_bits(step_of(learner, dataset, ONE, True), expected)
    assert len(towers) == 2  # written anew


@pytest.mark.slow("several runs")
@pytest.mark.parametrize("fault", ["full", "no folder"])
def test_where_nothing_can_be_written_the_run_continues(
    fault: str,
    make_config: MakeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = make_config("llava", LANGUAGE, image_cache=DISK, steps=3, batch_size=8)
    if fault == "full":

        def full(path: Path, data: bytes) -> int:
            assert path.name.startswith(".")
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
    else:
        (tmp_path / "home" / ".cache" / "mmtrain").mkdir(parents=True)
        (tmp_path / "home" / ".cache" / "mmtrain" / "features").write_text("")
    train(config)
    assert [row["step"] for row in rows(config)] == [1, 2, 3]
    assert capsys.readouterr().err.count("no more image features are cached in") == 1


@pytest.mark.slow("steps under several settings")
@pytest.mark.parametrize(
    "tune", [{"vision": LORA, **LANGUAGE}, {"projector": {"mode": "full"}, **LANGUAGE}, {"projector": LORA}, MIXED]
)
def test_nothing_trainable_is_cached(tune: dict[str, Any], make_config: MakeConfig) -> None:
    learner, _ = learner_for(make_config("llava", tune))
    assert learner.make_inputs.features is None
    assert not is_as_loaded(learner.model, Components(learner.model.get_base_model()), ("vision", "projector"))


def test_nothing_is_cached_where_weights_are_sharded(make_config: MakeConfig) -> None:
    config = make_config("llava", LANGUAGE, weights="shard")
    assert caches_features(config, 1)
    assert not caches_features(config, 2)
    assert caches_features(make_config("llava", LANGUAGE), 2)


@pytest.mark.slow("several runs")
def test_evaluation_is_that_of_pixels_and_sees_an_adapter_of_the_vision_tower(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    found: dict[str, list[Any]] = {}
    for name, features in (("kept", {}), ("pixels", OFF)):
        config = make_config("llava", {"vision": LORA, **LANGUAGE}, image_cache=features, steps=2, batch_size=4)
        if name == "kept":
            train(config)
        path = str(Path(config.run.output_dir) / "adapter")
        evaluation = ModelScoring(config, [config.data.train[0].path], [path])
        found[name] = []
        for adapter in ("base", "base", path):
            with evaluation.model(adapter) as model:
                found[name].append(evaluation.scores(model).nll)
    for kept, pixels in zip(found["kept"], found["pixels"], strict=True):
        assert kept == pytest.approx(pixels, rel=1e-5)
    assert abs(found["kept"][2] - found["kept"][0]).max() > 1e-3


@pytest.mark.slow("several runs")
def test_from_the_second_epoch_on_images_cost_nothing(make_config: MakeConfig) -> None:
    found = {}
    for name, features in (("kept", {}), ("pixels", OFF)):
        config = make_config("qwen2_5_vl", LANGUAGE, image_cache=features, steps=3, batch_size=8)
        train(config)
        operations = [row["mfu"] * row["seconds"] for row in rows(config)]  # a step has all samples
        found[name] = [value / operations[0] for value in operations]
        shutil.rmtree(config.run.output_dir)
    assert found["pixels"] == pytest.approx([1.0, 1.0, 1.0])
    assert found["kept"][1] == pytest.approx(found["kept"][2])
    assert found["kept"][1] < 0.9
