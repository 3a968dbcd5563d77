"""The error that a user can correct, messages without passwords, and how to print them."""

import io
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# A password may hold @, / and spaces that nobody encoded. With spaces it is hidden up to an @ that
# a path, a port or a host without dots follows; other text with an @ may be an e-mail address.
_USER = r"[^/:\s\[]+:(?!\s|\d{1,5}(?![^\s/?#,;.:)\]'\"]))"  # not if a port follows the colon
_THIS_URL = r"(?:(?!\w://).)*"
URL = re.compile(
    rf"(?s)(?<=\w://)(?:{_USER}{_THIS_URL}@(?=[^\s@/:]+(?:/|:\d)|[\w-]+\.?(?![\w.@-]))"
    rf"|{_USER}[^\s@]*\s(?:(?!\w://)[^@])*@(?:\S*@)?|\S+)"
)
LOGIN = re.compile(r"(?s)\A(?:[^/:\s]+:.*|[^/\s]+)@")
PARAMETER = re.compile(
    r"(?i)(?<=[?&;#])([\w.-]{0,40}(?:token|secret|passw|pwd|credential|signature|\bsig\b|api_?-?key"
    r"|access_?-?key)[\w.-]{0,40}=)[^\s&;#'\"<>]+"
)
HEADER = re.compile(
    r"(?i)(authorization['\"]?\s*[:=]\s*b?['\"]?(?:[a-z]+\s+(?=\S))?|(?-i:\bBearer)\s+)[^\s'\",]+"
)


DAMAGED = (ValueError, LookupError, TypeError, AttributeError)  # what damaged files raise


class UserError(Exception):
    """An error that the user can correct: its message names what is wrong and what to do."""


def tolerate_settings() -> None:
    """Keep the user's settings of Python from ending this program.

    Characters that the locale lacks are printed as escapes, like on standard error. Warnings of
    other packages are printed, also with PYTHONWARNINGS=error.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if any(option.startswith("error") for option in sys.warnoptions):
        warnings.simplefilter("default")
        os.environ.pop("PYTHONWARNINGS", None)  # for DVC, which it would end


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, without passwords and tokens.

    Of a long one its two ends: other packages put the cause at the end. An error without a message
    gives the name of its type.
    """
    text = without_secrets(str(error))  # first, because a password may hold a line break
    line = text.strip().partition("\n")[0].rstrip(":") or type(error).__name__
    return line if len(line) <= 400 else f"{line[:200]} … {line[-200:]}"


@contextmanager
def in_a_sentence(
    sentence: str, *kinds: type[Exception], words: Callable[[Any], str] = first_line
) -> Iterator[None]:
    """Turn errors of some kinds, or of all, into a UserError.

    Parameters
    ----------
    words : what stands for %s in the sentence
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or not isinstance(error, kinds or Exception):
            raise
        raise UserError(sentence.replace("%s", words(error))) from error


def refuse_conflict(path: Path, text: str) -> None:
    """Refuse the text of a file in which Git has marked a merge conflict."""
    if re.search("^<<<<<<< ", text, re.MULTILINE):
        side = f"edit it, or take one side: `git checkout --ours {path}`, or --theirs"
        raise UserError(f"{path} holds a merge conflict: {side}; then `dvc repro`")


def without_secrets(text: str) -> str:
    """Replace logins in URLs, tokens in their parameters, and Authorization headers by …"""
    text = URL.sub(lambda url: LOGIN.sub("…@", url[0]), text)
    return HEADER.sub(r"\1…", PARAMETER.sub(r"\1…", text))
