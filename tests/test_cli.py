"""The command line: a user's mistake ends with exit code 2 and one line for each fault, on stderr."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import mmtrain
from mmtrain import cli
from mmtrain.config import load_config

HEAVY = ("torch", "transformers", "peft", "accelerate", "pydantic", "numpy", "PIL")


def run_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """The exit code, stdout and stderr of `mmtrain words…`, in this process."""
    monkeypatch.setattr(sys, "argv", ["mmtrain", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    printed = capsys.readouterr()
    return int(caught.value.code or 0), printed.out, printed.err


def modules_after(words: list[str]) -> tuple[str, set[str]]:
    """What a new process prints for `mmtrain words…`, and which of the heavy modules it has imported."""
    code = (
        "import sys; sys.argv = ['mmtrain', *sys.argv[1:]]\n"
        "from mmtrain.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print('\\nIMPORTED', *[name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    printed, _, imported = done.stdout.rpartition("\nIMPORTED")
    return printed + done.stderr, set(imported.split())


def test_help_imports_nothing_heavy() -> None:
    printed, imported = modules_after(["--help"])
    assert "Usage" in printed
    assert imported == set()


@pytest.mark.parametrize("command", ["train", "config"])
def test_the_help_of_a_command_imports_no_model_code(command: str) -> None:
    printed, imported = modules_after([command, "--help"])
    assert "Usage" in printed
    assert not imported & {"torch", "transformers", "peft", "accelerate", "numpy", "PIL"}


def test_a_faulty_config_is_refused_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("modle: 1\n")
    printed, imported = modules_after(["train", str(path)])
    assert "unknown key; did you mean 'model'?" in printed
    assert not imported & {"torch", "transformers", "peft", "accelerate"}


def test_python_m_mmtrain_refuses_with_exit_code_2_on_stderr_alone(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("model: {path: 1}\ntrain: {stepz: 3}\nrun: {output_dir: x}\n")
    done = subprocess.run([sys.executable, "-m", "mmtrain", "train", str(path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    for place in (f"{path}:1: model.path: ", f"{path}:1: data: required", f"{path}:2: train.stepz: unknown key"):
        assert [line for line in lines if line.startswith(f"mmtrain: {place}")]


@pytest.mark.parametrize(
    ("content", "overrides", "lines"),
    [
        ("", [], 1),
        ("{}\n", [], 3),
        ("modle: 1\n", [], 4),
        ("a: [\n", [], 1),
        ("", ["train.steps=x"], 4),
        ('"a\\nb": 1\n', [], 4),
    ],
)
def test_each_fault_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    content: str,
    overrides: list[str],
    lines: int,
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(content)
    code, out, err = run_main(monkeypatch, capsys, "train", str(path), *overrides)
    assert (code, out) == (2, "")
    printed = err.splitlines()
    assert all(line.startswith("mmtrain: ") for line in printed)
    assert len(printed) == lines


def test_a_missing_config_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run_main(monkeypatch, capsys, "train", str(tmp_path / "nowhere.yaml"))
    assert (code, out) == (2, "")
    assert err.splitlines() == [f"mmtrain: {tmp_path}/nowhere.yaml: cannot be read: No such file or directory"]


def test_the_first_hundred_faults_are_shown_and_the_others_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yaml"
    letters = "abcdefghij"
    path.write_text("".join(f"{a}{b}{c}zzz: 1\n" for a in letters for b in letters for c in letters))
    code, _, err = run_main(monkeypatch, capsys, "train", str(path))
    printed = err.splitlines()
    assert code == 2
    assert len(printed) == 101
    assert printed[-1] == "mmtrain: and 903 more"  # 1,000 unknown keys and 3 missing sections


def test_faults_that_are_alike_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("".join(f"k{i}: 1\n" for i in range(1200)))
    code, _, err = run_main(monkeypatch, capsys, "train", str(path))
    printed = err.splitlines()
    assert code == 2
    assert len(printed) == 4
    (line,) = [line for line in printed if "unknown key" in line]
    assert line.startswith(f"mmtrain: {path}:1200 (and 1,199 more lines: 1, 2, 3 …): k1199: unknown key")


@pytest.mark.parametrize(
    "words", [["trian"], ["train"], ["train", "--frehs", "c.yaml"], ["config", "shema"], ["--nothing"]]
)
def test_a_wrong_command_or_option_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    code, out, err = run_main(monkeypatch, capsys, *words)
    assert (code, out) == (2, "")
    assert "Usage" in err
    assert "Traceback" not in err


def test_config_schema_prints_the_json_schema(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run_main(monkeypatch, capsys, "config", "schema")
    schema = json.loads(out)
    assert (code, err) == (0, "")
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert list(schema["properties"]) == ["model", "tune", "data", "objective", "labels", "train", "run"]


def test_an_interrupt_that_a_library_turns_into_an_error_ends_with_130_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def importing() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise ModuleNotFoundError("Could not import module 'AutoImageProcessor'") from None

    monkeypatch.setattr(cli, "app", importing)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code, out, err = run_main(monkeypatch, capsys)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (code, out, err) == (130, "", "mmtrain: interrupted\n")


def test_an_interrupt_ends_with_130_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    code, out, err = run_main(monkeypatch, capsys)
    assert (code, out, err) == (130, "", "mmtrain: interrupted\n")


def test_the_version_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(monkeypatch, capsys, "--version") == (0, f"mmtrain {mmtrain.__version__}\n", "")


@pytest.fixture
def small_config(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "train.jsonl").touch()
    path = tmp_path / "c.yaml"
    path.write_text(
        f"model: {{path: {tmp_path}/model}}\ndata: {{train: {tmp_path}/train.jsonl}}\nrun: {{output_dir: x}}\n"
    )
    return path


def test_a_config_is_shown_with_its_defaults(
    small_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run_main(monkeypatch, capsys, "config", "show", str(small_config), "train.steps=7")
    assert (code, err) == (0, "")
    shown = yaml.safe_load(out)
    (source,) = shown["data"]["train"]
    assert source["path"] == f"{small_config.parent}/train.jsonl"
    assert (source["format"], source["weight"], source["fields"]) == ("auto", 1.0, {})
    assert (shown["train"]["steps"], shown["train"]["batch_size"]) == (7, 16)
    again = small_config.with_name("again.yaml")
    again.write_text(out)
    assert load_config(again) == load_config(small_config, ["train.steps=7"])


def test_a_config_is_checked(
    small_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run_main(monkeypatch, capsys, "config", "check", str(small_config))
    assert (code, err) == (0, "")
    assert out.startswith(f"{small_config}: no faults; ")
    small_config.write_text(small_config.read_text() + "train: {stepz: 1}\nlabels: 3\n")
    code, out, err = run_main(monkeypatch, capsys, "config", "check", str(small_config), "train.seed=-1")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 3


def test_a_shell_can_complete_commands() -> None:
    code = "import sys; sys.argv = ['mmtrain']; from mmtrain.cli import main; main()"
    environment = {
        **os.environ,
        "_MMTRAIN_COMPLETE": "complete_bash",
        "COMP_WORDS": "mmtrain inspect-",
        "COMP_CWORD": "1",
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["inspect-data", "inspect-labels", "inspect-model"]


@pytest.mark.parametrize("command", [["config", "check"], ["config", "show"], ["runs"]])
def test_light_commands_import_no_model_code(command: list[str], small_config: Path) -> None:
    path = small_config if command[0] == "config" else small_config.parent
    printed, imported = modules_after([*command, str(path)])
    assert printed.strip()
    assert not imported & {"torch", "transformers", "peft", "accelerate", "PIL"}


def test_windows_is_refused_in_one_line() -> None:
    code = "import sys; sys.platform = 'win32'; import mmtrain"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    expected = "mmtrain: it does not run on Windows: use Linux, or Linux in WSL 2\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", expected)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (
            ["train", "c.yaml", "--learning_rate", "1e-4"],
            "no option '--learning_rate'; .*: did you mean train.lear",
        ),
        (
            ["train", "--learning-rate=1e-4", "c.yaml"],
            "no option '--learning-rate'; .*: did you mean train.lear",
        ),
        (
            ["eval", "answers", "c.yaml", "--tune.vision.rank", "8"],
            "no option '--tune.vision.rank'; .*vision.rank",
        ),
        (
            ["plan", "c.yaml", "--lr", "1e-4"],
            "no option '--lr'; a key of the config is set as KEY=VALUE: use train.lea",
        ),
    ],
)
def test_an_option_that_is_a_key_of_the_config_says_how_the_key_is_set(
    words: list[str], hint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run_main(monkeypatch, capsys, *words)
    assert (code, out) == (2, "")
    assert re.match(f"mmtrain: command line: {hint}", err)


def test_a_line_that_nobody_reads_ends_no_command() -> None:
    code = (
        "import sys; from mmtrain.progress import Progress\n"
        "from mmtrain.runtime.environment import ignore_lost_stderr; ignore_lost_stderr()\n"
        "Progress().say('one'); print('two', file=sys.stderr, flush=True)\n"
        "print(sys.stderr.fileno(), sys.stderr.isatty())"
    )
    read, write = os.pipe()
    os.close(read)
    for lost in (write, os.open("/dev/full", os.O_WRONLY)):
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=lost, text=True, check=True)
        os.close(lost)
        assert done.stdout == "2 False\n"


def test_output_that_does_not_fit_is_a_storage_error_in_one_line() -> None:
    words = [sys.executable, "-m", "mmtrain", "config", "schema"]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (4, 1)
    assert "standard output: No space left on device; free space" in done.stderr
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.stderr == ""
