"""Text without secrets, for logs, errors and tracking servers: everybody with access to these reads them."""

import re
from collections.abc import Mapping
from typing import Any

# `token` is a credential, `tokenizer` and `tokenize` are not.
_SECRET_KEY = re.compile(
    r"token(?!iz)|secret|passw(or)?d|credential|key_?id|(api|access|private)[_-]?key", re.IGNORECASE
)
# Up to the last @ before a slash or a space: a password may itself hold an @.
_USERINFO = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/\s\"']*@")
_QUERY_SECRET = re.compile(
    r"([?&][\w.-]*(?:token|signature|secret|password|credential|sig|key)[\w.-]*=)[^&\s\"']+", re.IGNORECASE
)


def is_secret(key: str) -> bool:
    """Whether a key names a credential."""
    return _SECRET_KEY.search(key) is not None


def scrub_text(text: str) -> str:
    """The text without user names and passwords in URIs, and without signatures in their queries."""
    return _QUERY_SECRET.sub(r"\1***", _USERINFO.sub(r"\1", text))


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
