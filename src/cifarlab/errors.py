"""The error that a user can correct, and messages without passwords."""

import re


class UserError(Exception):
    """An error that the user can correct: its message names what is wrong and what to do."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without passwords in URLs.

    An error without a message gives the name of its type.
    """
    line = str(error).strip().partition("\n")[0].rstrip(":")
    return without_secrets(line or type(error).__name__)


def without_secrets(text: str) -> str:
    """Replace user names and passwords in URLs by an ellipsis: https://…@example.org."""
    return re.sub(r"://(?:[^/\s]+|[^/:\s]+:\S+)@", "://…@", text)
