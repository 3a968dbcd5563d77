"""cifarlab: what does this change to the network do?"""

import re


class UserError(Exception):
    """An error that the user can mend: one sentence that names the thing and the way out."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type where it has none, without passwords in URLs."""
    return without_secrets(str(error).strip().partition("\n")[0].rstrip(":") or type(error).__name__)


def without_secrets(text: str) -> str:
    """Hide user names and passwords of URLs."""
    return re.sub(r"://(?:[^/\s]+|[^/:\s]+:\S+)@", "://…@", text)
