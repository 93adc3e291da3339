"""The one error that is shown to the user without a traceback."""

from collections.abc import Iterable


class UserError(Exception):
    """A fault that the user can mend: in the config, the data, the model directory or the command line.

    Each of `faults` is one line that says where, what is wrong, what was expected and what to do.
    The command line prints them all and exits with `exit_code`.
    """

    exit_code = 2

    def __init__(self, faults: str | Iterable[str]) -> None:
        self.faults = [faults] if isinstance(faults, str) else list(faults)
        super().__init__("\n".join(self.faults))


class NonFiniteError(UserError):
    """The loss or the gradient is not a number any more: the run cannot go on, and nothing of it is saved."""

    exit_code = 6
