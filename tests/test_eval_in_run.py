"""Questions asked during a run: the same metrics as `mmtrain eval answers`, and not a bit of the training changes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from mmtrain.cli import app
from mmtrain.config.schema import Config
from mmtrain.encoding.load import load_processor
from mmtrain.generate.replies import Generator
from mmtrain.progress import QUIET
from mmtrain.train import learner
from mmtrain.train.dataset import Dataset
from mmtrain.train.eval_sets import spread
from mmtrain.train.run import train
from support.builders import SHAPES, TINY, write_jsonl
from support.forked import Server
from support.learning import LORA, MIXED
from test_processes import run as run_with_processes

OTHERS = pytest.mark.slow("other kinds of models")
MakeConfig = Callable[..., Config]
SMALL = {"steps": 4, "batch_size": 4, "checkpoint_every": 2, "eval_every": 4}
ASK = {"samples": 64, "every": 3, "batch_size": 2}


def with_eval(config: Config, *, answers: dict[str, Any] | None = ASK, folder: str = "run", **run: Any) -> Config:
    """The config with its training data as two sources of `data.eval`, the second one its first sample."""
    data = config.model_dump(mode="json")
    path = Path(data["data"]["train"][0]["path"])
    one = path.with_name("one.jsonl")
    one.write_text(path.read_text().splitlines()[0] + "\n")
    data["data"]["eval"] = [{"path": str(path), "name": "all"}, {"path": str(one), "name": "one"}]
    output_dir = str(Path(config.run.output_dir).with_name(folder))
    data["run"] |= {"output_dir": output_dir, "eval_answers": answers, **run}
    return Config.model_validate(data)


def rows(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.run.output_dir) / "metrics.jsonl").read_text().splitlines()]


def answer_rows(config: Config) -> list[dict[str, Any]]:
    return [row for row in rows(config) if "answers" in row]


def trained(config: Config) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """What the training gave: its rows without times, and the adapter."""
    train(config)
    kept = [{k: v for k, v in row.items() if k not in ("seconds", "mfu")} for row in rows(config)]
    adapter = load_file(Path(config.run.output_dir) / "adapter" / "adapter_model.safetensors")
    return [row for row in kept if "answers" not in row], adapter


@pytest.mark.slow("several runs")
@pytest.mark.parametrize("kind", ["qwen2_5_vl", *(pytest.param(kind, marks=OTHERS) for kind in ("llava", "text"))])
def test_asking_changes_no_bit_of_the_training(kind: str, make_config: MakeConfig) -> None:
    tune = MIXED if kind != "text" else {"language": {**LORA, "dropout": 0.1, "variant": "dora"}}
    config = make_config(kind, tune, **SMALL)
    asking = with_eval(config)
    plain_rows, plain = trained(with_eval(config, answers=None, folder="plain"))
    found_rows, found = trained(asking)
    assert found_rows == plain_rows
    assert all(torch.equal(found[name], weight) for name, weight in plain.items())
    assert [(row["step"], row["answers"]) for row in answer_rows(asking)] == [
        (step, name) for step in (0, 3, 4) for name in ("all", "one")
    ]


@pytest.mark.slow("compiles layers")
@pytest.mark.filterwarnings("ignore")  # of torch.compile
def test_checkpointed_and_compiled_layers_give_the_same_answers(make_config: MakeConfig) -> None:
    """Both would break generation: one drops the cache, the other is compiled again for each length."""
    config = make_config("text", steps=1)
    plain = with_eval(config, folder="plain")
    other = with_eval(config, activation_checkpointing=True, compile=True)
    generating: list[bool] = [False]
    replies = Generator.replies

    def watched(*arguments: Any) -> Any:
        generating[0] = True
        found = replies(*arguments)
        generating[0] = False
        return found

    def backend(graph: Any, inputs: Any) -> Any:
        assert not generating[0]
        return graph

    def compile_layers(model: Any) -> None:
        for layer in model.get_decoder().layers:
            layer.compile(backend=backend, dynamic=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner, "compile_layers", compile_layers)
        patch.setattr(Generator, "replies", watched)
        train(other)
    train(plain)
    texts = [[row["answer"] for row in answers(one, 1)] for one in (plain, other)]
    assert texts[0] == texts[1]
    assert any(texts[0])


def answers(config: Config, step: int) -> list[dict[str, Any]]:
    path = Path(config.run.output_dir) / "answers" / f"step-{step:06d}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def shapes_config(folder: Path, **answers: Any) -> Config:
    """The tiny model, which answers questions about shapes, and 12 of them; some are asked twice."""
    found = json.loads((SHAPES / "test.json").read_text(encoding="utf-8"))
    open_questions = [row for row in found if row["conversations"][1]["value"] not in ("yes", "no")]
    source = {"path": str(write_jsonl(folder / "eval.jsonl", open_questions[:12])), "root": str(SHAPES)}
    return Config.model_validate(
        {
            "model": {"path": str(TINY), "dtype": "float32"},
            "data": {"train": [source], "eval": [{**source, "name": "shapes"}]},
            "train": {"steps": 2, "batch_size": 4, "learning_rate": 1e-3},
            "run": {"output_dir": str(folder / "run"), "eval_answers": answers},
        }
    )


@pytest.mark.slow("several runs")
def test_the_figures_are_those_of_eval_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = shapes_config(tmp_path)
    train(config)
    words = ["eval", "answers", f"{config.run.output_dir}/config.yaml", "--adapter", config.run.output_dir, "--json"]
    expected = json.loads(CliRunner().invoke(app, words).stdout)
    before, after = answer_rows(config)
    assert (before["step"], after["step"], after["num_answers"], after["metric"]) == (0, 2, 12, "exact_match")
    for row, kind in ((after, "metrics"), (before, "base")):
        assert row["metrics"] == pytest.approx(expected[kind])
        assert row["blind"] == pytest.approx(expected["blind"])
    assert before["metrics"]["exact_match"] > 0.5
    exact, blind = after["metrics"]["exact_match"], after["blind"]["exact_match"]
    line = f"step 2  answers shapes: exact_match {exact:.1%}, best blind answer {blind:.1%} (12 answers)"
    assert line in capsys.readouterr().err
    card = (Path(config.run.output_dir) / "adapter" / "README.md").read_text()
    assert f"- exact_match of 12 answers on shapes: {exact:.1%}, best blind answer {blind:.1%}" in card
    written = answers(config, 2)
    assert sum(row["score"] for row in written) / 12 == pytest.approx(exact)
    assert {row["place"] for row in written} == {f"{tmp_path}/eval.jsonl:{line}" for line in range(1, 13)}
    assert all((row["answer"] == row["reference"]) == (row["score"] == 1) for row in written)


@pytest.mark.parametrize(
    ("number", "sizes", "expected"),
    [
        (64, [100], [64]),
        (64, [10], [10]),
        (64, [100, 100], [32, 32]),
        (64, [100, 10, 100], [27, 10, 27]),
        (2, [5, 5, 5], [1, 1, 1]),
        (7, [9, 9], [3, 4]),
    ],
)
def test_the_samples_are_spread_over_the_sources(number: int, sizes: list[int], expected: list[int]) -> None:
    assert spread(number, sizes) == expected


def asked(config: Config) -> list[str]:
    (one,) = Dataset(config, load_processor(config.model.path), QUIET).eval
    assert one.questions is not None
    return one.questions.places


@pytest.mark.slow("several runs")
def test_the_samples_are_chosen_by_the_seed_alone(tmp_path: Path) -> None:
    config = shapes_config(tmp_path, samples=4)
    data = config.model_dump()
    other = Config.model_validate(data | {"train": data["train"] | {"steps": 9, "batch_size": 2}})
    seeded = Config.model_validate(data | {"train": data["train"] | {"seed": 1}})
    assert asked(config) == asked(other)
    assert len(set(asked(config))) == 4
    assert asked(config) != asked(seeded)


@pytest.mark.slow("runs of two processes")
def test_two_processes_give_the_same_answers(make_config: MakeConfig, tmp_path: Path, server: Server) -> None:
    """One of the two has nothing to ask of the source of one sample."""
    config = with_eval(make_config("text", **SMALL, microbatches=2))
    one, _ = run_with_processes(config, 1, tmp_path / "one", server)
    two, _ = run_with_processes(config, 2, tmp_path / "two", server)
    assert [row for row in one if "answers" in row] == [row for row in two if "answers" in row]
    name = "answers/step-000004.jsonl"
    assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()
    assert (tmp_path / "one" / name).read_text().count("\n") > 2


@pytest.mark.parametrize("kind", ["tiny", "qwen2_5_vl"])
@pytest.mark.slow("runs of two processes")
def test_sharded_weights_give_the_same_answers(
    kind: str, make_config: MakeConfig, tmp_path: Path, server: Server
) -> None:
    """Before the first step the weights are the same. Batches of one: some have no image, and of the source of one
    sample one process has nothing to ask. Only the tiny model ends its replies, of one to three tokens."""
    ask = {"samples": 64, "every": 3, "batch_size": 1}
    config = shapes_config(tmp_path, **ask) if kind == "tiny" else with_eval(make_config(kind, **SMALL), answers=ask)
    run_with_processes(config, 1, tmp_path / "one", server)
    sharded = config.run.model_copy(update={"weights": "shard"})
    two, _ = run_with_processes(config.model_copy(update={"run": sharded}), 2, tmp_path / "two", server)
    found, expected = ((tmp_path / name / "answers" / "step-000000.jsonl").read_text() for name in ("two", "one"))
    assert found == expected
    replies = [json.loads(line) for line in found.splitlines()]
    assert {one["is_complete"] for one in replies} == {kind == "tiny"}
    assert len({one["answer"] for one in replies}) > 3
    assert {row["step"] for row in two if "answers" in row} == {0, *((2,) if kind == "tiny" else (3, 4))}


def test_what_cannot_be_asked_is_refused(make_config: MakeConfig) -> None:
    data = with_eval(make_config("text")).model_dump(mode="json")
    data["data"]["eval"] = []
    with pytest.raises(ValueError, match="there is nothing to ask"):
        Config.model_validate(data)
