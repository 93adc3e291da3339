"""What the README and the shipped files promise is there and true."""

import importlib
import json
import re
import subprocess
from pathlib import Path

import pytest

from mmtrain.config import load_config
from mmtrain.config.schema import json_schema
from support.builders import ROOT, TINY

README = (ROOT / "README.md").read_text(encoding="utf-8")
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_every_shipped_config_loads_and_names_the_schema() -> None:
    assert {"quickstart.yaml", "qwen2_5_vl_7b_lora.yaml", "llava_1_5_7b_lora.yaml"} <= {path.name for path in CONFIGS}
    for path in CONFIGS:
        load_config(path)
        assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n")


def test_the_shipped_schema_is_the_one_of_the_code() -> None:
    assert json.loads((ROOT / "configs" / "schema.json").read_text()) == json_schema()


def test_the_config_explained_in_the_readme_is_the_quickstart(tmp_path: Path) -> None:
    explained = re.search(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert explained is not None
    (tmp_path / "readme.yaml").write_text(explained.group(1))
    found, shipped = load_config(tmp_path / "readme.yaml"), load_config(ROOT / "configs" / "quickstart.yaml")
    assert found.tune == shipped.tune
    assert found.train == shipped.train
    assert [source.path for source in found.data.train] == [source.path for source in shipped.data.train]


def test_the_map_of_files_is_complete() -> None:
    named = re.findall(r"^\| `(mmtrain/[\w/]+\.py)` \|", ARCHITECTURE, re.MULTILINE)
    there = [str(path.relative_to(ROOT)) for path in (ROOT / "mmtrain").rglob("*.py") if not path.name.startswith("__")]
    assert sorted(named) == sorted(there)


def test_the_way_of_a_sample_names_what_is_there() -> None:
    rows = re.findall(r"^\| \d+ \| `([\w.]+)`", ARCHITECTURE, re.MULTILINE)
    assert 20 <= len(rows) <= 30
    for row in rows:
        package, module, *names = row.split(".")
        found = importlib.import_module(f"mmtrain.{package}.{module}")
        for name in names:
            found = getattr(found, name)
        assert callable(found)


def test_the_commands_of_the_readme_are_commands() -> None:
    from typer.main import get_command

    from mmtrain.cli import app

    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    used = set(re.findall(r"^mmtrain ([\w-]+)", "\n".join(blocks), re.MULTILINE))
    assert used
    assert used <= known


def test_nothing_shipped_is_too_large() -> None:
    assert sum(path.stat().st_size for path in TINY.iterdir()) <= 8_000_000
    others = [p for p in (ROOT / "data_samples").rglob("*") if p.is_file() and TINY not in p.parents]
    assert sum(path.stat().st_size for path in others) < 12_000_000


def test_the_project_speaks_of_itself_alone() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    words = re.compile(r"/(?:work|root|home)/\w|artifactory|\bTODO\b|\bFIXME\b")
    texts = [ROOT / name for name in listed if name.endswith((".py", ".md", ".yaml", ".toml", ".txt"))]
    for path in texts:
        if path.is_file() and path != Path(__file__):
            assert not words.search(path.read_text(encoding="utf-8")), path
