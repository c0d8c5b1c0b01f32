"""What is raised for a user to read, and how another library's error becomes one line of it."""


class UserError(ValueError):
    """Something the user can put right; its text is the one line shown."""


class SaveError(RuntimeError):
    """A save that failed; what was saved before is untouched. Its text is the one line shown."""


def first_line(error: BaseException) -> str:
    """The first line of its text that says something; its class where none does."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
