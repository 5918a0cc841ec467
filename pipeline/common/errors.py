"""Errors that a user can cause."""

OUT_OF_MEMORY = "the GPU's memory does not suffice: make check names a parameter to change"


class UserError(SystemExit):
    """The message is one line: what is wrong, where, and what to do. Uncaught, Python prints it and exits with 1."""
