"""What is raised for a user to read, and how another library's error becomes one line of it."""

from typing import Any


class UserError(ValueError):
    """Something the user can put right; its text is the one line shown."""


class SaveError(RuntimeError):
    """A save that failed; what was saved before is untouched. Its text is the one line shown."""


class RankLost(RuntimeError):
    """Another process of the run is gone, or silent. Its text is the one line shown."""


class TrainingError(RuntimeError):
    """The run cannot go on; its text is the one line shown."""


class Stopped(Exception):
    """A signal asked the run to end; what it had done is saved."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


def refuse(*rules: tuple[Any, str]) -> None:
    """Raises UserError with the first message whose condition holds."""
    for wrong, message in rules:
        if wrong:
            raise UserError(message)


def first_line(error: BaseException) -> str:
    """The first line of its text that says something; its class where none does."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
