"""Errors that a user can cause."""

OUT_OF_MEMORY = "not enough GPU memory: run make check, which names a parameter to change"


class UserError(SystemExit):
    """The message is one line: what is wrong, where, and what to do. If uncaught, Python prints it and exits with 1."""
