"""mmtrain's own run for scripts/bench: as `mmtrain train`, with a look at the clock behind each step.

python scripts/bench_own.py CONFIG SETTINGS.json RESULT.json
"""

from __future__ import annotations

import json
import resource
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from mmtrain.host_memory import reuse_host_memory

reuse_host_memory()  # as the command does, before torch is imported

import torch  # noqa: E402

from mmtrain.config import load_config  # noqa: E402
from mmtrain.train import loop  # noqa: E402


def main() -> None:
    config_path, settings_path, result_path = (Path(word) for word in sys.argv[1:])
    begun = json.loads(settings_path.read_text())["begun"]
    config = load_config(config_path)
    shutil.rmtree(config.train.output_dir, ignore_errors=True)
    rows: list[dict[str, float]] = []
    take = loop.train_step

    def watched(*args: Any) -> Any:
        done = take(*args)
        rows.append({"wall": time.time() - begun, "cpu": time.process_time(), "loss": done.loss})
        return done

    rates: list[float] = []
    measure = loop.matmul_rate

    def kept(*args: Any) -> float:
        rates.append(measure(*args))
        return rates[-1]

    loop.train_step, loop.matmul_rate = watched, kept
    loop.train(config)
    metrics = (Path(config.train.output_dir) / "metrics.jsonl").read_text().splitlines()
    for row, told in zip(rows, map(json.loads, metrics), strict=True):
        row["operations"] = told["mfu"] * told["seconds"] * rates[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    gpu = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    result_path.write_text(json.dumps({"rows": rows, "peak_gib": gpu or peak, "matmul_rate": rates[0]}))


if __name__ == "__main__":
    main()
