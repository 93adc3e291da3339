"""The report about both splits of a config: lines, a JSON object, and a page."""

from dataclasses import asdict, dataclass
from typing import Any

from mmtrain.inspect_data.overlap import Overlap
from mmtrain.inspect_labels.audit_report import AuditReport
from mmtrain.report.chart import Chart, bar_chart
from mmtrain.report.environment import page_template


@dataclass(frozen=True, slots=True)
class DataReport:
    """Both splits of a config."""

    splits: tuple[AuditReport, ...]
    overlap: Overlap | None
    """None without evaluation data."""

    @property
    def num_faults(self) -> int:
        return sum(split.num_faults for split in self.splits)

    def row(self) -> dict[str, Any]:
        """The report as one JSON object."""
        overlap = self.overlap and {**asdict(self.overlap), "image_share": self.overlap.image_share}
        return {"splits": {split.split: split.row() for split in self.splits}, "overlap": overlap}

    def page(self) -> str:
        """The report as one HTML page that needs no network and no script. All text is escaped."""
        rows = [(split.row(), _charts(split.row())) for split in self.splits]
        return page_template(__package__).render(splits=rows, overlap=overlap_lines(self.overlap))


def overlap_lines(overlap: Overlap | None) -> list[str]:
    """What training and evaluation data have in common, in words."""
    if overlap is None:
        return ["There is no evaluation data; `data.eval: {from: train, share: 0.05}` takes 5 % of the training data."]
    return [
        f"Images in both: {overlap.num_shared_images:,} of {overlap.num_train_images:,} in the training data "
        f"({overlap.image_share:.1%}) and {overlap.num_eval_images:,} in the evaluation data",
        f"Evaluation samples that are also trained on: {overlap.num_shared_samples:,}",
        *(f"  {place} = {other}" for place, other in overlap.shared_samples),
    ]


def _charts(row: dict[str, Any]) -> list[Chart]:
    wanted = (
        ("Lengths of samples", "tokens", row["length_histogram"]),
        ("Images", "pixels of the longer side", row["image_histogram"]),
    )
    return [
        bar_chart(title, unit, [(one["from"], one["to"]) for one in bins], [one["count"] for one in bins])
        for title, unit, bins in wanted
        if bins
    ]
