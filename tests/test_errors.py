"""No message tells a password or a token, and ordinary text stays as it is."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cifarlab.errors import first_line, without_secrets
from tests.support.draws import DRAWS

HOSTS = ["host:5000", "host/api", "mlflow.example.org:80/x", "mlflow.example.org/x", "localhost"]
# Without white space at its start, and not like a port.
PASSWORDS = st.text(string.ascii_letters + "@/:?#%'\"\\ \n\té=&", min_size=1, max_size=20).filter(
    lambda text: text[0].isalpha()
)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("after", ["", ", sorry", " is down", "' is down", "\nsecond line"])
@pytest.mark.parametrize(
    "password", ["a", "a@b", "a@b/c", "a/b@c", "a b", "a'b", 'a"b', "a\nb", "a b@c", "1234", "12/3"]
)
def test_the_userinfo_of_a_url_is_hidden(password: str, after: str, host: str) -> None:
    text = f"Failed to parse: 'https://user:{password}@{host}{after}"
    assert without_secrets(text) == f"Failed to parse: 'https://…@{host}{after}"


@DRAWS
@given(st.sampled_from(HOSTS), PASSWORDS)
def test_any_password_is_hidden(host: str, password: str) -> None:
    assert without_secrets(f"in https://user:{password}@{host}, sorry") == (
        f"in https://…@{host}, sorry"
    )


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("https://token@host/x", "https://…@host/x"),
        ("https://a:b@h1 and http://c:d@h2", "https://…@h1 and http://…@h2"),
        ("https://a:b@h.org/x, or write to me@b.org", "https://…@h.org/x, or write to me@b.org"),
        ("https://h/a?token=abc&x=1&sig=a%2Bb", "https://h/a?token=…&x=1&sig=…"),
        ("https://h/?X-Amz-Signature=abc&api_key=d#e", "https://h/?X-Amz-Signature=…&api_key=…#e"),
        ("Authorization: Bearer abc.def sent", "Authorization: Bearer … sent"),
        ("{'Authorization': 'Basic YTpi', 'x': 1}", "{'Authorization': 'Basic …', 'x': 1}"),
        ("got Bearer abc", "got Bearer …"),
    ],
)
def test_tokens_are_hidden(text: str, hidden: str) -> None:
    assert without_secrets(text) == hidden


@pytest.mark.parametrize(
    "text",
    [
        "write to me@example.org",
        "git@github.com:owner/name",
        "see https://example.org, or write to me@example.org",
        "http://127.0.0.1:5000 is down; ask me@example.org",
        "http://127.0.0.1:5000: connection refused; ask me@example.org",
        "https://www.npmjs.com/package/@angular/core",
        "https://example.org/?design=3&sigma=2&page=1",
        "the bearer of news needs authorization",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert without_secrets(text) == text


def test_a_line_break_in_a_password_does_not_cut_it_in_half() -> None:
    assert first_line(ValueError("bad http://u:ab\ncd@host:80/x\nmore")) == "bad http://…@host:80/x"


@pytest.mark.timeout(60)  # a pattern that backtracks needs minutes for these
@pytest.mark.parametrize(
    "text", ["http://", "http://a:", "http://a:b ", "://a:b@", "?token", "authorization:", "@ a:"]
)
def test_hostile_text_costs_no_time(text: str) -> None:
    without_secrets(text * 50_000)
