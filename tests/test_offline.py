"""Nothing leaves the machine: commands in a process whose every attempt to reach another one is noted and fails."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.builders import make_text, mixed_rows, write_jsonl

WATCHED = """
import json, socket, sys

attempts = []

def note(*args, **kwargs):
    attempts.append(repr(args)[:200])
    raise OSError("no network in this test")

socket.socket.connect = socket.socket.connect_ex = socket.socket.sendto = note
socket.getaddrinfo = socket.gethostbyname = socket.create_connection = note

from mmtrain.cli import main

codes = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["mmtrain", *words]
    try:
        main()
        codes.append(0)
    except SystemExit as end:
        codes.append(end.code or 0)

from huggingface_hub import constants

switches = [constants.HF_HUB_OFFLINE, constants.HF_HUB_DISABLE_TELEMETRY]
print("WATCHED", json.dumps({"codes": codes, "attempts": attempts, "switches": switches}))
"""
ONLINE = {"HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "0", "DO_NOT_TRACK": "0"}
"""What a user's environment may say."""


@pytest.fixture
def hub_model(tmp_path: Path) -> dict[str, str]:
    """The environment of a user who has the model `owner/tiny` in the local hub cache."""
    repository = tmp_path / "hub" / "models--owner--tiny"
    commit = "0" * 40
    make_text(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return {**os.environ, **ONLINE, "HF_HUB_CACHE": str(tmp_path / "hub"), "OMP_NUM_THREADS": "1"}


@pytest.mark.slow("every command in its own process, without a network")
def test_no_command_reaches_the_network_whatever_the_user_s_environment_says(
    tmp_path: Path, hub_model: dict[str, str]
) -> None:
    data = write_jsonl(tmp_path / "data" / "mixed.jsonl", mixed_rows(tmp_path / "data", with_images=False))
    run = tmp_path / "run"
    config = {
        "model": {"path": "owner/tiny", "dtype": "float32"},
        "tune": {"language": {"mode": "lora", "targets": ["q_proj", "lm_head"]}},
        "data": {"train": [{"path": str(data)}], "eval": [{"path": str(data)}]},
        "train": {"steps": 1},
        "run": {"output_dir": str(run)},
    }
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config))
    commands = [
        ["train", str(path)],
        ["eval", "perplexity", str(path), "--adapter", str(run), "--json"],
        ["eval", "perplexity", str(path), "--compare", "base", str(run / "adapter"), "--json"],
        ["inspect-labels", str(path), "--losses", "--adapter", str(run)],
        ["eval", "perplexity", str(path), "--adapter", "owner/adapter"],
        ["eval", "perplexity", str(path), "--compare", "base", "owner/adapter"],
        ["inspect-labels", str(path), "--losses", "--adapter", "owner/adapter"],
        ["eval", "perplexity", str(path), "model.path=owner/other"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, json.dumps(commands)],
        capture_output=True,
        text=True,
        env=hub_model,
        cwd=tmp_path,
        timeout=240,
        check=False,
    )
    assert "WATCHED" in done.stdout, done.stderr
    found = json.loads(done.stdout.partition("WATCHED")[2])
    assert found == {"codes": [0, 0, 0, 0, 2, 2, 2, 2], "attempts": [], "switches": [True, True]}, done.stderr
    assert "Traceback" not in done.stderr
    assert sum("owner/adapter: no adapter there" in line for line in done.stderr.splitlines()) == 3
