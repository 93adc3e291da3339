"""Trains every set of components of a model on the same data, and compares the results.

    python scripts/component_study CONFIG [KEY=VALUE...] --other FILE [OPTION...]

CONFIG is a config of mmtrain with `data.eval`; its `tune` and `run.output_dir` are replaced. Every non-empty set of
vision, projector and language is trained, with LoRA and in full. With the first seed each learning rate is tried; the
one with the lowest evaluation loss gets the other seeds. For a seed, all runs have the same data, steps and order of
samples.

Reported are perplexity and exact match on `data.eval`, their paired differences from the base model and from training
the language model alone, and what became of another task (`--other`, a data file): exact match there, and KL(base ‖
tuned) of the next-token probabilities on its replies. Finished runs are not repeated.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from component_study.plot import draw
from component_study.table import Row, markdown, rows_of, text
from component_study.trial import BASE, COMPONENTS, Setting, result_path, run_one

SUBSETS = [subset for size in (1, 2, 3) for subset in combinations(COMPONENTS, size)]


@dataclass(frozen=True)
class Study:
    """What the command line says."""

    config: Path
    overrides: list[str]
    other: Path
    work: Path
    modes: list[str]
    rates: list[float]
    seeds: list[int]
    jobs: int
    """Runs at the same time, each in a process of its own; 1: one after the other in this process."""

    def first_settings(self) -> Iterator[Setting]:
        """The base model, and every set of components with each rate and the first seed."""
        yield BASE
        for mode in self.modes:
            for subset in SUBSETS:
                for rate in self.rates:
                    yield Setting(mode, subset, rate, self.seeds[0])

    def other_settings(self) -> Iterator[Setting]:
        """The other seeds, with the best rate of each set."""
        for mode in self.modes:
            for subset in SUBSETS:
                tried = [Setting(mode, subset, rate, self.seeds[0]) for rate in self.rates]
                best = min(tried, key=lambda setting: self.loss(setting))
                for seed in self.seeds[1:]:
                    yield Setting(mode, subset, best.rate, seed)

    def result(self, setting: Setting) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(result_path(self.work, setting).read_text(encoding="utf-8"))
        return found

    def loss(self, setting: Setting) -> float:
        """Nats per token on `data.eval`."""
        own = self.result(setting)["eval"]
        return float(sum(own["nll"]) / sum(own["num_tokens"]))

    def run(self, settings: list[Setting]) -> None:
        """Those that are not done yet."""
        missing = [setting for setting in settings if not result_path(self.work, setting).exists()]
        with ThreadPoolExecutor(self.jobs) as pool:
            done = map(self.run_here, missing) if self.jobs == 1 else pool.map(self.run_in_process, missing)
            for number, _ in enumerate(done, start=1):
                print(f"{number} of {len(missing)} runs done", file=sys.stderr, flush=True)

    def run_here(self, setting: Setting, own_process: bool = False) -> None:
        run_one(self.config, self.overrides, self.other, self.work, setting, own_process)

    def run_in_process(self, setting: Setting) -> None:
        log = self.work / f"{setting.name}.log"
        words = [str(self.config), *self.overrides, "--other", str(self.other), "--work", str(self.work)]
        with log.open("w", encoding="utf-8") as file:
            done = subprocess.run(
                [sys.executable, str(Path(__file__).parent), *words, "--one", setting.name],
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if done.returncode:
            sys.exit(f"{setting.name} failed: see {log}")


def read_words() -> tuple[Study, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys of the config")
    parser.add_argument("--other", type=Path, required=True, help="data of another task, to see what is forgotten")
    parser.add_argument("--work", type=Path, default=Path("runs/component-study"), help="folder for all runs")
    parser.add_argument("--modes", nargs="+", choices=["lora", "full"], default=["lora", "full"])
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; from 2 on, each has a process of its own")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")
    parser.add_argument("--plot", type=Path, help="write the plot to this .svg file")
    parser.add_argument("--one", help="do one run alone, by its name")
    words = parser.parse_intermixed_args()
    study = Study(
        words.config, words.overrides, words.other, words.work, words.modes, words.rates, words.seeds, words.jobs
    )
    return study, words


def main() -> None:
    study, words = read_words()
    study.work.mkdir(parents=True, exist_ok=True)
    if words.one:
        study.run_here(Setting.named(words.one), own_process=True)
        return
    study.run(list(study.first_settings()))
    study.run(list(study.other_settings()))
    settings = [*study.first_settings(), *study.other_settings()]
    rows: list[Row] = rows_of({setting: study.result(setting) for setting in settings})
    print(text(rows))
    if words.json:
        words.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if words.markdown:
        words.markdown.write_text(markdown(rows), encoding="utf-8")
    if words.plot:
        words.plot.write_text(draw(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
