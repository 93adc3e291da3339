"""Faults in the data of a run and in the threads that load it. A case gives what was wrong, one line each."""

import re
import time
from pathlib import Path

import PIL.Image
from safetensors.torch import load_file

from support.builders import make_llava, write_jsonl
from support.fault_cases import World, once, saved_step
from support.forked import patch, until


def with_images(world: World) -> Path:
    """A config over eight samples with a JPEG each."""
    folder = world.folder / f"images-{len(list(world.folder.glob('images-*')))}"
    (folder / "images").mkdir(parents=True)
    model = world.folder / "llava"
    if not model.exists():
        make_llava(model)
    records = []
    for number in range(8):
        PIL.Image.effect_noise((64, 64), 50 + number).convert("RGB").save(folder / "images" / f"{number}.jpg")
        turns = [
            {"role": "user", "content": "<image>What is it?"},
            {"role": "assistant", "content": f"It is {number}"},
        ]
        records.append({"messages": turns, "images": [f"images/{number}.jpg"]})
    data = write_jsonl(folder / "images.jsonl", records)
    changed = {"model": {**world.data["model"], "path": str(model)}, "data": {"train": [{"path": str(data)}]}}
    return world.write({**world.data, **changed}, f"{folder.name}.yaml")


def nan_case(world: World, target: str, rank: int, step: int) -> list[str]:
    """What `target` gives is not finite, in one process and one step."""
    folder = world.new_folder()
    more = ("run.checkpoint_every=1", "run.keep_checkpoints=9")
    group = world.start(folder, 2, {rank: [patch(target, "nan", folder / "done", step)]}, *more)
    try:
        codes = group.wait(30)
        faults = [] if codes == [6, 6] else [f"exit codes {codes}: {group.text[-1500:]}"]
        faults += once(group, f"mmtrain: step {step}: the loss is") + once(group, "mixed.jsonl:")
        if saved_step(folder) != step - 1:
            faults.append(f"step {saved_step(folder)} is saved, not {step - 1}")
        faults += non_finite(folder / "run" / "checkpoints")
    finally:
        group.end()
    where = f"{target} not finite in {rank}, step {step}: "
    return [where + fault for fault in faults + world.check_going_on(folder, *more)]


def non_finite(folder: Path) -> list[str]:
    return [
        f"{path}: {name} is not finite"
        for path in folder.glob("step-*/*.safetensors")
        for name, value in load_file(path).items()
        if not value.isfinite().all()
    ]


def loader_case(world: World, do: str, rank: int) -> tuple[list[str], float]:
    """What happens in a thread that loads, in one process: an image breaks after the check, it raises, it hangs."""
    folder = world.new_folder()
    target, nth = (
        ("mmtrain.dataset.image_inputs.read_bytes", 1) if do == "break" else ("mmtrain.dataset.batch.Loader.load", 3)
    )
    flag = folder / "done"
    words = world.words(folder, "run.hang_timeout=3", config=with_images(world))
    group = world.server.start(folder, words, 2, {rank: [patch(target, do, flag, nth=nth)]})
    try:
        until(flag)
        begun = time.monotonic()
        codes = group.wait(30)
        seconds = time.monotonic() - begun
        code, message = {
            "break": (2, "images.jsonl:"),
            "raise": (1, f"process {rank} failed: RuntimeError: as the test wants it"),
            "hang": (5, f"process {rank} (pid {group.pids[rank]} on "),
        }[do]
        faults = [] if codes == [code] * 2 else [f"exit codes {codes}: {group.text[-1500:]}"]
        lines = [line for line in group.text.splitlines() if line.startswith("mmtrain: ")]
        if sum(message in line for line in lines) != 1 and not (do == "raise" and rank == 0):
            faults.append(f"not reported once: {lines}")
        if do == "hang":
            stuck = [line for line in lines if "has not moved" in line]
            faults += (
                [] if len(stuck) == 1 and stuck[0].count("process ") == 2 and ", data;" in stuck[0] else [str(lines)]
            )
        elif do == "break" and "Traceback" in group.text:
            faults.append(f"a traceback: {group.text[-3000:]}")
    finally:
        group.end()
    return [f"a loader of {rank} is to {do}: {fault}" for fault in faults], seconds


def refused_case(world: World, rank: int) -> list[str]:
    """A batch in the middle of a run cannot be made, in one process: the last complete step is saved, and the same
    command continues to what a run without the fault leaves."""
    folder, config = world.new_folder(), with_images(world)
    more = ("train.steps=8", "run.checkpoint_every=100")
    refused = patch("mmtrain.dataset.batch.load_image_inputs", "refuse", folder / "done", nth=9)
    group = world.server.start(folder, world.words(folder, *more, config=config), 2, {rank: [refused]})
    try:
        codes, text = group.wait(60), group.text
    finally:
        group.end()
    faults = [] if codes == [2, 2] else [f"exit codes {codes}: {text[-1500:]}"]
    faults += once(group, "images.jsonl:")
    line = r"^mmtrain: .*images\.jsonl:\d+: the samples .*: as the test wants it; step (\d+) is saved: fix the data"
    said = re.search(line, text, re.MULTILINE)
    if said is None or int(said[1]) != saved_step(folder):
        faults.append(f"step {saved_step(folder)} is saved, and it says: {text[-1500:]}")
    expected = world.new_folder()
    for where in (folder, expected):
        again = world.server.start(where / "again", world.words(where, *more, config=config))
        faults += [] if again.wait() == [0] else [f"it does not resume: {again.text[-1500:]}"]
    found, other = (where / "run" / "adapter" / "adapter_model.safetensors" for where in (folder, expected))
    if found.read_bytes() != other.read_bytes():
        faults.append("another adapter than that of a run without the fault")
    return [f"a batch is refused in {rank}: {fault}" for fault in faults]


def refused_sharded_case(world: World, rank: int) -> list[str]:
    """The same where the weights are sharded: nothing can be saved, and that is said where a step is lost."""
    folder, config = world.new_folder(), with_images(world)
    more = ("train.steps=8", "run.checkpoint_every=100", "run.weights=shard")
    nth = (24, 9)[rank]  # in the middle of the steps: the first process also decodes images of the trial of packing
    refused = patch("mmtrain.dataset.image_process.decode", "refuse", folder / "done", nth=nth)
    group = world.server.start(folder, world.words(folder, *more, config=config), 2, {rank: [refused]})
    try:
        codes = group.wait(60)
        faults = [] if codes == [2, 2] else [f"exit codes {codes}: {group.text[-1500:]}"]
        faults += once(group, "images.jsonl:")
        if rank == 0 and "cannot be saved, because the weights are sharded" not in group.text:
            faults.append(f"not said: {group.text[-1500:]}")
    finally:
        group.end()
    return [f"a batch is refused in {rank}, sharded: {fault}" for fault in faults]
