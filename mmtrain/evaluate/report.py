"""The figures of `eval perplexity` for a person, in 80 columns, with colour or without."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mmtrain.safe_text import counted, shortened, visible
from mmtrain.scoring.results import figure_table, say
from mmtrain.scoring.statistics import perplexity_text

_NAME_WIDTH = 22
_GROUPS = (("sources", "source"), ("turns", "turn"), ("modality", "samples"), ("lengths", "tokens of an answer"))
_CHANGES = {"swapped": "swapped", "grey": "grey", "none": "left out"}
_NOTHING = 5e-5
"""Nats per token that are printed as 0.0000: less is taken for rounding in the model."""
_FEW_SAMPLES = 20
_MAX_TEXT = 32
"""Characters of a question or a reply that are shown."""
_BAR = 40
"""Characters of a bar."""
_DISTRIBUTIONS = (
    "KL (first ‖ model) is how far a model's next-token probabilities are from the first model's, and entropy how "
    "undecided it is, in nats per supervised token. The expected accuracy is the mean probability of the most likely "
    "token; above the observed accuracy, the model is too sure of itself. The error is the expected calibration error. "
    "In the bars, by the probability of "
    "the most likely token, │ marks the expected accuracy."
)
_NOT_ACCURACY = (
    "Likelihood is not accuracy: a model can find the right answers likely and still write wrong ones. "
    "`mmtrain eval answers` generates answers and scores them."
)


def print_report(row: Mapping[str, Any], console: Console) -> None:
    """Prints the figures of `row`; its losses are in nats per token."""
    for line in _head(row):
        say(line, console)
    say(f"\n{_NOT_ACCURACY}", console, wrap=True)
    for key, title in _GROUPS:
        if row[key]:
            console.print()
            console.print(_group_table(title, row[key]))
    for key, title in (("least_likely", "Least likely samples"), ("most_likely", "Most likely samples")):
        if row[key]:
            say(f"\n{title}, nats per token", console)
        for entry in row[key]:
            question, reference = (visible(shortened(entry[name], _MAX_TEXT)) for name in ("question", "reference"))
            say(f"  {entry['nll']:>8.4f}  {visible(entry['place'])}", console)
            say(f"            {question} → {reference}", console)
    if row["images"] is not None:
        console.print()
        console.print(_image_table(row["images"]))
        say(f"\n{_sentence(row['images']['verdict'])}", console, wrap=True)


def print_comparison(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Prints a row for each model; the differences are from the first model on the same answers."""
    table = figure_table("model", "perplexity", "nats/token", "more than first", "share")
    for row in rows:
        perplexity = f"{_number(row['perplexity'])}\n{_range(map(_number, row['interval']['perplexity']))}"
        figures = row["difference"]
        more = [_nats(figures), _share(figures).split("\n")[0]] if figures else ["–", "–"]
        table.add_row(Text(visible(row["name"])), perplexity, f"{row['nll']:.4f}", *more)
    console.print(table)
    say("\nThe second lines are 95 % intervals.", console)
    if any(row["difference"] for row in rows):
        say("Below 0 a model is better than the first, surely so where its whole interval is.", console, wrap=True)
    console.print()
    console.print(_distribution_table(rows))
    say(f"\n{_DISTRIBUTIONS}", console, wrap=True)
    for row in rows:
        say(f"\n{visible(row['name'])}: accuracy by confidence", console)
        for line in _calibration_plot(row["calibration"]["bins"]):
            say(line, console)


def _distribution_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = figure_table("model", "KL", "entropy", "expected", "observed", "error")
    for row in rows:
        own, far = row["calibration"], row["divergence"]
        divergence = "–" if far is None else f"{far['mean']:.4f}\n{far['interval'][0]:.4f} to {far['interval'][1]:.4f}"
        shares = [own[key] for key in ("expected_accuracy", "observed_accuracy", "expected_calibration_error")]
        entropy = f"{row['entropy']['mean']:.4f}"
        table.add_row(Text(visible(row["name"])), divergence, entropy, *(f"{share:.1%}" for share in shares))
    return table


def _calibration_plot(bins: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A bar of the observed accuracy for each bin of confidence, with a mark at the expected one."""
    for one in bins:
        mark = round(one["confidence"] * (_BAR - 1))
        bar = ["█" if place < round(one["accuracy"] * _BAR) else " " for place in range(_BAR)]
        bar[mark] = "│"
        low, high = one["range"]
        yield f"  {low:.1f} to {high:.1f} {''.join(bar)} {one['accuracy']:>6.1%}  {counted(one['num_tokens'], 'token')}"


def image_verdict(images: Mapping[str, Any]) -> str:
    """In words, what swapping the images shows: whether the model looks at them, and what they are worth to it."""
    swapped = images.get("swapped")
    if not swapped:
        return "whether the model uses the images is not known: no image could be swapped for another"
    low, high = swapped["interval"]
    few = swapped["num_samples"]
    doubt = f"; only {counted(few, 'sample')}: too few to be sure" if few < _FEW_SAMPLES else ""
    nats = f"{_signless(swapped['nats_per_token'])} nats per token"
    interval = f"95 % interval {_signless(low)} to {_signless(high)}"
    if low < _NOTHING:
        change = "change nothing" if high > -_NOTHING else "serve it no worse"
        return f"the model ignores the images: other images {change} ({nats}, {interval}){doubt}"
    share = swapped["share"]
    of_loss = "" if share is None else f", {100 * share:,.1f} % of the loss with the right images"
    return f"the images are worth {nats} ({interval}){of_loss}{doubt}"


def _head(row: Mapping[str, Any]) -> Iterator[str]:
    low, high = row["interval"]["nll"]
    bits = row["bits_per_byte"]
    yield _line("perplexity", _number(row["perplexity"]), f"95 % {_range(map(_number, row['interval']['perplexity']))}")
    yield _line("loss", f"{row['nll']:.4f}", f"nats per token, 95 % {low:.4f} to {high:.4f}")
    yield _line("mean of samples", f"{row['sample_nll']:.4f}", "nats per token, each sample counting the same")
    yield _line("bits per byte", "–" if bits is None else f"{bits:.4f}", "of the answers in UTF-8")
    yield _line("token accuracy", f"{row['token_accuracy']:.2%}", "of the supervised tokens were the most likely")
    yield _line("supervised tokens", f"{row['num_supervised']:,}", f"in {counted(row['num_samples'], 'sample')}")


def _line(name: str, value: str, more: str) -> str:
    return f"{name:<17} {value:>10}  {more}"


def _group_table(title: str, groups: Mapping[str, Mapping[str, float]]) -> Table:
    table = figure_table(title, "perplexity", "nats/token", "accuracy", "tokens", "samples")
    for name, group in groups.items():
        figures = [_number(group["perplexity"]), f"{group['nll']:.4f}", f"{group['token_accuracy']:.2%}"]
        counts = [f"{group['num_supervised']:,}", f"{group['num_samples']:,}"]
        table.add_row(Text(visible(name)), *figures, *counts)
    table.columns[0].width = _NAME_WIDTH
    return table


def _image_table(images: Mapping[str, Any]) -> Table:
    table = figure_table("images", "nats/token", "more by, 95 %", "share, 95 %", "samples")
    for key, name in _CHANGES.items():
        if figures := images.get(key):
            table.add_row(name, f"{figures['nll']:.4f}", _nats(figures), _share(figures), f"{figures['num_samples']:,}")
    return table


def _nats(figures: Mapping[str, Any]) -> str:
    low, high = figures["interval"]
    return f"{_signed(figures['nats_per_token'])}\n{_signed(low)} to {_signed(high)}"


def _share(figures: Mapping[str, Any]) -> str:
    """As a share of the loss that it is compared with; a dash where that is 0."""
    if figures["share"] is None:
        return "–"
    interval = figures["share_interval"]
    limits = f"\n{_range(f'{100 * value:+z,.1f}' for value in interval)} %" if interval else ""
    return f"{100 * figures['share']:+z,.1f} %{limits}"


def _signed(nats: float) -> str:
    """With its sign, except what is printed as 0."""
    return "0.0000" if abs(nats) < _NOTHING else f"{nats:+.4f}"


def _signless(nats: float) -> str:
    return _signed(nats).removeprefix("+")


def _number(value: float) -> str:
    return perplexity_text(value, decimals=3)


def _range(limits: Iterable[str]) -> str:
    return " to ".join(limits)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
