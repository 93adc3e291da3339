"""The device of a run: found, checked, and what it refuses said in one line."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.deterministic

from mmtrain.answers.command import AnswersOptions, eval_answers
from mmtrain.config.schema import Config
from mmtrain.errors import FINAL_CODES, DeviceMemoryError, UserError
from mmtrain.runtime import device, environment
from mmtrain.runtime.device import check_exchange, device_faults, find_device, make_deterministic
from mmtrain.runtime.launch import num_local_gpus
from mmtrain.train.checkpoint import CheckpointFolder
from mmtrain.train.run import train

GPU = torch.device("cuda", 0)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has torch report a machine with such devices."""

    def make(
        kind: str | None = "cuda", count: int = 1, capability: tuple[int, int] = (9, 0), hip: str | None = None
    ) -> None:
        found = None if kind is None else torch.device(kind)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: kind == "cuda")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
        monkeypatch.setattr(device, "_compute_on", lambda device: None)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: kind == "mps")

    return make


@pytest.mark.parametrize(
    ("kind", "wanted", "expected"),
    [
        (None, "auto", "cpu"),
        (None, "cpu", "cpu"),
        ("cuda", "auto", "cuda:1"),
        ("cuda", "cuda", "cuda:1"),
        ("cuda", "cpu", "cpu"),
        ("mps", "mps", "mps"),
        ("mps", "cpu", "cpu"),
        ("mps", "auto", "cpu"),
        ("xpu", "cpu", "cpu"),
        ("xpu", "auto", "cpu"),
    ],
)
def test_a_process_takes_the_device_of_its_number(
    kind: str | None, wanted: str, expected: str, machine: Callable[..., None]
) -> None:
    machine(kind, count=2)
    assert str(find_device(wanted, "bfloat16", 1)) == expected


@pytest.mark.parametrize(
    ("kind", "wanted", "words"),
    [
        (None, "cuda", "run.device: cuda: .*set run.device to auto or cpu"),
        (None, "mps", "run.device: mps: .*set run.device to auto or cpu"),
        ("mps", "cuda", "run.device: cuda"),
    ],
)
def test_a_device_that_is_missing_or_not_supported_is_one_line(
    kind: str | None, wanted: str, words: str, machine: Callable[..., None]
) -> None:
    machine(kind)
    with pytest.raises(UserError, match=words) as refused:
        find_device(wanted, "float32")
    assert len(refused.value.faults) == 1
    assert "\n" not in refused.value.faults[0]


def test_cards_before_ampere_compute_in_float32_alone(machine: Callable[..., None]) -> None:
    machine(capability=(7, 5))
    assert find_device("auto", "float32") == GPU
    with pytest.raises(UserError, match=r"model.dtype: a card has compute capability 7\.5.*to float32"):
        find_device("auto", "bfloat16")
    machine(capability=(8, 0))
    assert find_device("auto", "bfloat16") == GPU


def test_rocm_is_taken_only_by_name(machine: Callable[..., None]) -> None:
    machine(hip="7.0")
    assert find_device("auto", "bfloat16").type == "cpu"
    assert num_local_gpus("auto") == 0
    assert find_device("cuda", "bfloat16") == GPU
    assert num_local_gpus("cuda") == 1


@pytest.mark.parametrize(
    ("kind", "hip", "words"),
    [
        ("mps", None, "device: cpu, because mmtrain is not tested on MPS; run.device=mps tries it"),
        ("cuda", "7.0", "device: cpu, because mmtrain is not tested on ROCm; run.device=cuda tries it"),
        ("xpu", None, "device: cpu, because mmtrain does not support devices of kind xpu"),
        (None, None, "device: cpu, because torch finds no GPU although there is an NVIDIA driver: run nvidia-smi"),
    ],
)
def test_a_gpu_that_auto_does_not_use_is_one_line_of_the_first_process(
    kind: str | None,
    hip: str | None,
    words: str,
    machine: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "version").touch()
    monkeypatch.setattr(device, "_DRIVER_VERSION", tmp_path / "version")
    machine(kind, hip=hip)
    find_device("auto", "float32")
    assert " ".join(capsys.readouterr().err.split()) == words
    find_device("auto", "float32", 1)
    find_device("cpu", "float32")
    assert not capsys.readouterr().err


def test_a_gpu_on_which_nothing_can_be_computed_is_one_line(
    machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(device: torch.device) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with ...")

    machine()
    monkeypatch.setattr(device, "_compute_on", fail)
    with pytest.raises(UserError, match=r"a card cannot be used: CUDA error: no kernel image .* set run.device to cpu"):
        find_device("auto", "float32")


def test_more_processes_than_gpus_are_refused(machine: Callable[..., None]) -> None:
    machine(count=2)
    with pytest.raises(UserError, match="process 2 of this machine has no GPU: there are 2"):
        find_device("auto", "bfloat16", 2)


def test_a_run_on_the_cpu_starts_one_process_whatever_gpus_there_are(machine: Callable[..., None]) -> None:
    machine(count=8)
    assert [num_local_gpus(name) for name in ("auto", "cuda", "cpu", "mps")] == [8, 8, 0, 0]


@pytest.mark.parametrize(
    ("version", "refused"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023", True),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  545.23.08  Release Build", True),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.14  Release Build", False),
    ],
)
def test_a_driver_that_exchanges_nothing_between_cards_is_refused(
    version: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version").write_text(version)
    monkeypatch.setattr(device, "_DRIVER_VERSION", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    check_exchange(GPU, {"NCCL_P2P_DISABLE": "1"})
    if refused:
        with pytest.raises(UserError, match="NCCL_P2P_DISABLE=1"):
            check_exchange(GPU, {})
    else:
        check_exchange(GPU, {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L40S")
    check_exchange(GPU, {})


@pytest.fixture
def _plain_algorithms() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]


@pytest.mark.usefixtures("_plain_algorithms")
def test_a_gpu_is_made_to_give_the_same_bits_and_the_cpu_left_alone() -> None:
    variables = dict[str, str]()
    make_deterministic(torch.device("cpu"), variables)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not variables
    make_deterministic(GPU, variables)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()  # with warnings only, attention keeps its atomics
    assert variables == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    variables = {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    make_deterministic(GPU, variables)
    assert variables == {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}


@pytest.mark.usefixtures("_plain_algorithms")
def test_an_operator_without_a_deterministic_kernel_is_named() -> None:
    make_deterministic(GPU, {})
    values = torch.tensor([1.0, 2.0])
    with (
        pytest.raises(UserError, match=r"put_ has no deterministic kernel: set run.microbatches to auto"),
        device_faults(lambda: "step 1", "lower it"),
    ):
        values.put_(torch.tensor([0, 0]), torch.tensor([5.0, 6.0]), accumulate=False)


def test_other_errors_pass_as_they_are() -> None:
    with pytest.raises(RuntimeError, match="another"), device_faults(lambda: "step 1", "lower it"):
        raise RuntimeError("another")


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in ...",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "NCCL error in ...: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
    ],
)
def test_a_library_that_finds_the_memory_full_is_one_line(words: str) -> None:
    with (
        pytest.raises(DeviceMemoryError, match="step 1: out of memory: lower it"),
        device_faults(lambda: "step 1", "lower it"),
    ):
        raise RuntimeError(words)


def test_answers_are_generated_on_the_device_of_the_config(make_config: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=r"run\.device: cuda: this build of torch has no CUDA"):
        eval_answers(make_config("text", device="cuda"), AnswersOptions())


@pytest.mark.parametrize("setting", [{}, {"PYTORCH_CUDA_ALLOC_CONF": "x"}, {"PYTORCH_ALLOC_CONF": "x"}])
def test_segments_grow_unless_the_user_says_otherwise(setting: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    variables = dict(setting)
    monkeypatch.setattr(os, "environ", variables)
    environment.set_environment()
    found = {name: value for name, value in variables.items() if name.endswith("ALLOC_CONF")}
    assert found == (setting or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})


@pytest.mark.slow("several runs")
@pytest.mark.parametrize(("tokens", "key"), [(1, "data.max_length"), (1000, "run.microbatch_tokens")])
def test_a_full_memory_ends_the_run_in_one_line_with_its_checkpoints_valid(
    tokens: int, key: str, make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The allocation is real: the CPU has no such memory."""
    config = make_config("qwen2_5_vl", steps=4, checkpoint_every=1, microbatch_tokens=tokens)
    backward, calls = torch.autograd.backward, list[int]()

    def grown(*arguments: Any, **others: Any) -> None:
        calls.append(1)
        torch.empty(2**55, device="cpu") if len(calls) > 2 * (8 if tokens == 1 else 1) else None
        backward(*arguments, **others)

    monkeypatch.setattr(torch.autograd, "backward", grown)
    words = rf"step 3, a micro-batch of [\d,]+ tokens and \d images: out of memory: lower {key}, or set run.activ"
    with pytest.raises(DeviceMemoryError, match=words) as full:
        train(config)
    assert len(full.value.faults) == 1
    assert full.value.exit_code == 8
    assert full.value.exit_code in FINAL_CODES
    newest, broken = CheckpointFolder(Path(config.run.output_dir) / "checkpoints", 2).newest()
    assert (newest and newest.name, broken) == ("step-000002", [])
