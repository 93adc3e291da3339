"""The commands as Python functions give what the commands give."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mmtrain import api
from mmtrain.cli import app
from mmtrain.config import dump_config
from mmtrain.config.schema import Config
from mmtrain.errors import UserError
from support.builders import ROOT

RECORD = {
    "messages": [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Fine."}],
}


@pytest.fixture
def config_file(make_config: Callable[..., Config], tmp_path: Path) -> Path:
    data = make_config("text", steps=2).model_dump()
    data["data"]["eval"] = [{"path": data["data"]["train"][0]["path"], "name": "held-out"}]
    path = tmp_path / "my.yaml"
    path.write_text(dump_config(Config.model_validate(data)))
    return path


def json_of(*words: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.exception
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.slow("several runs")
def test_the_functions_give_what_the_commands_give(config_file: Path) -> None:
    config = api.load_config(config_file, ["train.batch_size=4"])
    assert config.train.batch_size == 4
    run = api.train(config)
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    words = [str(config_file), "train.batch_size=4", "--adapter", str(run)]
    assert api.evaluate(config, run) == json_of("eval", "answers", *words)
    assert api.evaluate(config, run, "perplexity") == json_of("eval", "perplexity", *words)
    assert api.evaluate(config, None, "perplexity")["nll"] != api.evaluate(config, run, "perplexity")["nll"]
    questions = ["How are you?", "One?"]
    replies = api.generate(run, questions, max_new_tokens=5)
    alone = [CliRunner().invoke(app, ["generate", str(run), q, "--max-new-tokens", "5"]).stdout for q in questions]
    assert [f"{reply}\n" for reply in replies] == alone
    sampled = api.generate(run, ["One?"], system="Be short.", max_new_tokens=5, do_sample=True, temperature=9.0, seed=3)
    options = ["--system", "Be short.", "--do-sample", "--temperature", "9.0", "--seed", "3", "--max-new-tokens", "5"]
    assert [CliRunner().invoke(app, ["generate", str(run), "One?", *options]).stdout] == [f"{one}\n" for one in sampled]
    assert sampled != api.generate(run, ["One?"], system="Be short.", max_new_tokens=5)
    assert (run / "checkpoints" / "step-000002").is_dir()
    api.train(api.load_config(config_file, ["train.steps=1"]), fresh=True)
    assert not (run / "checkpoints" / "step-000002").exists()


def test_a_fault_of_a_question_is_one_of_the_user(config_file: Path) -> None:
    model = api.load_config(config_file).model.path
    with pytest.raises(UserError, match="without --do-sample"):
        api.generate(model, ["One?"], temperature=0.5)
    with pytest.raises(UserError, match=r"^generate: "):
        api.generate(model, ["One?"], [ROOT / "data_samples" / "shapes" / "images" / "test_0.png"], max_new_tokens=2)


def test_records_are_encoded_as_training_does(config_file: Path) -> None:
    config = api.load_config(config_file)
    first = json.loads(Path(config.data.train[0].path).read_text().splitlines()[0])
    encoded = api.encode(config, [first, RECORD])
    shown = json_of("inspect-labels", str(config_file), "--index", "0", "--tokens")
    assert [token["id"] for token in shown["tokens"]] == encoded[0].ids.tolist()
    assert [token["supervised"] for token in shown["tokens"]] == encoded[0].supervised.tolist()
    with pytest.raises(UserError, match="record 1: "):
        api.encode(config, [RECORD, {"messages": []}])


@pytest.mark.slow("trains and evaluates in its own process")
def test_the_code_of_the_page_runs(config_file: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=config_file.parent, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "exact_match" in lines[1]
    assert float(lines[2]) > 1
    assert lines[3].startswith("[")


def test_importing_it_is_quick() -> None:
    code = "import sys, mmtrain.api; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
