"""mmtrain's own run: as `mmtrain train`, with a measurement after each step.

    python -m bench.own CONFIG SETTINGS.json RESULT.json

The config has more steps than are taken, so that the loader reads ahead at the last of them as at any other, and every
step pays for the images of one step.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from mmtrain.runtime.environment import set_environment

set_environment()  # as the command does, before torch is imported

from bench.shapes import build_model  # noqa: E402
from bench.watch import Watch  # noqa: E402
from mmtrain.config import load_config  # noqa: E402
from mmtrain.train import run, trainable  # noqa: E402


class Enough(BaseException):
    """All steps to measure are done. Not an Exception, so that nothing handles it as an error."""


def main() -> None:
    config_path, settings_path, result_path = (Path(word) for word in sys.argv[1:])
    settings = json.loads(settings_path.read_text())
    config = load_config(config_path, settings["overrides"])
    shutil.rmtree(config.run.output_dir, ignore_errors=True)
    watch = Watch(settings)

    def on_step(row: dict[str, Any]) -> None:
        watch.end()
        watch.rows[-1] |= {key: row[key] for key in ("loss", "num_tokens", "operations")}
        watch.rows[-1]["ceiling"] = row["operations"] / (row["mfu"] * row["seconds"])
        if len(watch.rows) == settings["steps"]:
            raise Enough
        watch.begin()

    def built(*_: Any) -> Any:
        return build_model(config.model.path, config.model.dtype, settings["device"], settings["seed"]).eval()

    if settings["built"]:  # its weights were never saved, so nothing can load them
        trainable.load_base = built  # type: ignore[attr-defined, assignment]
    with contextlib.suppress(Enough):
        run.train(config, on_step=on_step)
    result_path.write_text(json.dumps({"rows": watch.rows, "matmul_rate": watch.rows[0]["ceiling"]}))


if __name__ == "__main__":
    main()
