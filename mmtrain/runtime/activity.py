"""What a process is doing, for those who watch it."""

from dataclasses import dataclass

IN_STEPS = frozenset(
    {"data", "forward", "backward", "gradients", "update", "evaluating", "saving", "awaiting the save"}
)
"""Phases after which a checkpoint can be written: a signal that comes in one of them is answered by saving."""
WAITING = frozenset({"gradients", "waiting", "awaiting the save"})
"""Phases in which a process waits for others: it is not the one that hangs."""


@dataclass(slots=True)
class Activity:
    """Written by the main thread, read by the supervisor's. `ticks` grows whenever something has been done."""

    phase: str = "starting"
    step: int = 0
    ticks: int = 0
    waiting: bool = False
    """In a collective: it waits for another process."""
    saves_alone: bool = False
    """This process can save the last complete step without the others, also when one of them has failed."""

    def set(self, phase: str, step: int | None = None) -> None:
        self.phase = phase
        self.step = self.step if step is None else step
        self.ticks += 1

    def tick(self) -> None:
        self.ticks += 1

    def __str__(self) -> str:
        return f"step {self.step}, {self.phase}" if self.step else self.phase
