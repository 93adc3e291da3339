"""The table of the study. Scores are averaged over seeds for each answer; intervals are over samples (bootstrap)."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from component_study.trial import BASE, Setting
from mmtrain.scoring.statistics import mean_by_sample, per_token

Row = dict[str, Any]
"""The figures of a set of components: `mode`, `components`, `rate`, costs, and each measure with its interval.
`to_sets` has the paired differences of exact match from every other set of the same mode."""
_LANGUAGE = ("language",)
_HEADS = (
    "mode", "trained", "parameters", "rate", "perplexity", "exact match", "to base", "to language only",
    "other: KL", "other: exact match", "tok/s", "MiB",
)  # fmt: skip


def rows_of(results: Mapping[Setting, dict[str, Any]]) -> list[Row]:
    """A row for the base model and for each set with its best rate; `tried` lists all rates of the first seed."""
    groups: dict[tuple[str, tuple[str, ...]], list[Setting]] = {}
    for setting in results:
        groups.setdefault((setting.mode, setting.subset), []).append(setting)
    averages = {}
    for key, settings in groups.items():
        best = _best_rate(settings, results)
        averages[key] = _average([results[setting] for setting in settings if setting.rate == best])
    base = averages[BASE.mode, BASE.subset]
    return [
        {
            "mode": mode,
            "components": list(subset),
            "rate": _best_rate(groups[mode, subset], results),
            "num_seeds": own["num_seeds"],
            "tried": _tried(groups[mode, subset], results),
            **{name: own.get(name) for name in ("num_trainable", "tokens_per_second", "peak_mib")},
            **_figures(own, base, averages.get((mode, _LANGUAGE)) if subset else None),
            "to_sets": {
                " + ".join(other): _gain(own, theirs)
                for (other_mode, other), theirs in averages.items()
                if other_mode == mode and other != subset
            },
        }
        for (mode, subset), own in averages.items()
    ]


def _tried(settings: list[Setting], results: Mapping[Setting, dict[str, Any]]) -> dict[float, float]:
    """The evaluation loss in nats per token by learning rate, with the first seed."""
    return {one.rate: _loss(results[one]) for one in settings if one.seed == settings[0].seed}


def _best_rate(settings: list[Setting], results: Mapping[Setting, dict[str, Any]]) -> float:
    tried = _tried(settings, results)
    return min(tried, key=lambda rate: tried[rate])


def _loss(result: dict[str, Any]) -> float:
    return float(sum(result["eval"]["nll"]) / sum(result["eval"]["num_tokens"]))


def _average(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean over seeds of every cost, and of every score for each answer."""
    found: dict[str, Any] = {"num_seeds": len(results)}
    for name in ("num_trainable", "tokens_per_second", "peak_mib"):
        if name in results[0]:
            found[name] = float(np.mean([result[name] for result in results]))
    for part in ("eval", "other"):
        found[part] = {
            name: np.mean([result[part][name] for result in results], axis=0)
            for name in ("nll", "num_tokens", "divergence", "right")
        }
        for name in ("sample", "question_sample"):
            found[part][name] = np.array(results[0][part][name])
        found[part]["right_by_seed"] = [float(np.mean(result[part]["right"])) for result in results]
    return found


def _figures(own: dict[str, Any], base: dict[str, Any], language: dict[str, Any] | None) -> Row:
    score, other = own["eval"], own["other"]
    nll = per_token(score["sample"], score["nll"], score["num_tokens"])
    divergence = per_token(other["sample"], other["divergence"], other["num_tokens"])
    return {
        "perplexity": [math.exp(nll["mean"]), *(math.exp(end) for end in nll["interval"])],
        "exact_match": _mean(score["question_sample"], score["right"]),
        "exact_match_by_seed": score["right_by_seed"],
        "to_base": _gain(own, base),
        "to_language": None if language is None else _gain(own, language),
        "other_divergence": [divergence["mean"], *divergence["interval"]],
        "other_exact_match": _mean(other["question_sample"], other["right"]),
        "other_to_base": _gain(own, base, "other"),
    }


def _gain(own: dict[str, Any], than: dict[str, Any], part: str = "eval") -> list[float]:
    """The paired difference of exact match, with its interval."""
    return _mean(own[part]["question_sample"], own[part]["right"] - than[part]["right"])


def _mean(samples: Any, values: Any) -> list[float]:
    mean, (low, high) = mean_by_sample(samples, values)
    return [mean, low, high]


def _cells(row: Row) -> list[str]:
    def share(values: list[float] | None, sign: str = "") -> str:
        if values is None:
            return "–"
        mean, low, high = (f"{100 * value:{sign}.1f}" for value in values)
        return f"{mean} ({low} to {high})"

    costs = [row[name] for name in ("num_trainable", "tokens_per_second", "peak_mib")]
    parameters, speed, memory = ("–" if cost is None else f"{cost:,.0f}" for cost in costs)
    mean, low, high = (f"{value:,.0f}" if value >= 100 else f"{value:.3f}" for value in row["perplexity"])
    base = not row["components"]
    return [
        "base" if base else row["mode"],
        "nothing" if base else " + ".join(row["components"]),
        parameters,
        "–" if base else f"{row['rate']:g}",
        f"{mean} ({low} to {high})",
        share(row["exact_match"]),
        "–" if base else share(row["to_base"], "+"),
        "–" if base or row["components"] == list(_LANGUAGE) else share(row["to_language"], "+"),
        f"{row['other_divergence'][0]:.4f}",
        share(row["other_exact_match"]),
        speed,
        memory,
    ]


def text(rows: list[Row]) -> str:
    """The table in columns for a terminal."""
    lines = [list(_HEADS), *map(_cells, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADS))]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def markdown(rows: list[Row]) -> str:
    lines = [list(_HEADS), ["---"] * len(_HEADS), *map(_cells, rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
