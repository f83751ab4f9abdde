"""Text without secrets, for logs, errors and tracking servers: everybody with access to these reads them."""

import re
from collections.abc import Mapping
from typing import Any

# `token` is a credential, `tokenizer` and `tokenize` are not.
_SECRET_KEY = re.compile(
    r"token(?!iz)|secret|passw(or)?d|credential|key_?id|(api|access|private)[_-]?key", re.IGNORECASE
)
# Up to the last @ before a slash or a space: a password may itself hold an @. Or, where something else than a port
# follows the first colon, a slash or spaces: up to the last @ of the word, or to the next @ of the line.
_USERINFO = re.compile(
    r"([A-Za-z][A-Za-z0-9+.-]*://)"
    r"(?:[^/\s\"']*@|[^/\s\"'@:]*:(?!\d{1,5}(?:[/?#\s\"',;)]|$))(?:(?:(?!://)[^\s\"'])*@|(?:(?!://)[^\n\"'@])*@))"
)
_QUERY_SECRET = re.compile(
    r"([?&#;][\w.-]*(?:token|signature|secret|passw|credential|sig|key)[\w.-]*=)[^&#\s\"']+", re.IGNORECASE
)
_HEADER = re.compile(r"\b(Bearer|Authorization: *\w+) +[\w.~+/=-]{6,}", re.IGNORECASE)


def is_secret(key: str) -> bool:
    """Whether a key names a credential."""
    return _SECRET_KEY.search(key) is not None


def scrub_text(text: str) -> str:
    """The text without logins in URIs, secrets in their queries and fragments, and tokens of HTTP headers."""
    return _HEADER.sub(r"\1 ***", _QUERY_SECRET.sub(r"\1***", _USERINFO.sub(r"\1", text)))


def has_login(uri: str) -> bool:
    """Whether an address holds a user name or a password."""
    return _USERINFO.match(uri) is not None


def scrub(value: Any) -> Any:
    """A JSON-able value without secrets, at any depth: secret keys are dropped, strings pass `scrub_text`."""
    if isinstance(value, Mapping):
        return {str(k): scrub(v) for k, v in value.items() if not is_secret(str(k))}
    if isinstance(value, list | tuple):
        return [scrub(v) for v in value]
    return scrub_text(value) if isinstance(value, str) else value


def one_line(error: BaseException) -> str:
    """An error's text without line breaks."""
    return " ".join(str(error).split())
