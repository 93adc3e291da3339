"""mmtrain's own run for scripts/bench: as `mmtrain train`, with a look at the clock behind each step.

python scripts/bench_own.py CONFIG SETTINGS.json RESULT.json

The config asks for more steps than are taken, so that the loader is ahead at the last of them as at any other, and the
pictures of every step are paid for in some step.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from mmtrain.runtime.environment import set_environment

set_environment()  # as the command does, before torch is imported

from bench_shapes import build_model  # noqa: E402
from bench_watch import Watch  # noqa: E402

from mmtrain.config import load_config  # noqa: E402
from mmtrain.train import run as loop  # noqa: E402


class Enough(BaseException):
    """The steps that were asked for are taken: nothing is wrong, so nothing must catch it on the way."""


def main() -> None:
    config_path, settings_path, result_path = (Path(word) for word in sys.argv[1:])
    settings = json.loads(settings_path.read_text())
    config = load_config(config_path, settings["overrides"])
    shutil.rmtree(config.run.output_dir, ignore_errors=True)
    watch = Watch(settings)
    take, measure, load = loop.train_step, loop.matmul_rate, loop.load_model

    def watched(*args: Any) -> Any:
        if len(watch.rows) == settings["steps"]:
            raise Enough
        watch.begin()
        done = take(*args)
        watch.end()
        watch.rows[-1]["loss"] = done.loss
        return done

    rates: list[float] = []

    def kept(*args: Any) -> float:
        rates.append(measure(*args))
        return rates[-1]

    def loaded(path: str, dtype: str, processor: Any) -> Any:
        if not settings["built"]:
            return load(path, dtype, processor)
        return build_model(path, dtype, settings["device"], settings["seed"]).eval()

    loop.train_step, loop.matmul_rate, loop.load_model = watched, kept, loaded
    with contextlib.suppress(Enough):
        loop.train(config)
    metrics = (Path(config.run.output_dir) / "metrics.jsonl").read_text().splitlines()
    for row, told in zip(watch.rows, map(json.loads, metrics), strict=True):
        row["operations"] = told["mfu"] * told["seconds"] * rates[0]
        row["num_tokens"] = told["num_tokens"]
    result_path.write_text(json.dumps({"rows": watch.rows, "matmul_rate": rates[0]}))


if __name__ == "__main__":
    main()
