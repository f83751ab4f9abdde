"""Values for a tracking server or a log: flat, short, and without secrets.

Parameters of an MLflow run are a flat map of short strings that everybody with access to the server reads,
so nested settings are flattened with dots, long values are cut with a digest of the whole, and credentials
never leave.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

MAX_VALUE = 500  # MLflow's older servers refuse longer parameters

# `token` is a credential, `tokenizer` and `tokenize` are not.
_SECRET_KEY = re.compile(
    r"token(?!iz)|secret|passw(or)?d|credential|key_?id|(api|access|private)[_-]?key", re.IGNORECASE
)
# Up to the last @ before a slash or a space: a password may itself hold an @.
_USERINFO = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^/\s\"']*@")
_QUERY_SECRET = re.compile(
    r"([?&][\w.-]*(?:token|signature|secret|password|credential|sig|key)[\w.-]*=)[^&\s\"']+", re.IGNORECASE
)

_NO_NAME = re.compile(r"[^\w .:/-]")


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


def shorten(text: str, limit: int = MAX_VALUE) -> str:
    """The text, or its beginning with a digest of the whole: two long values stay distinct after the cut."""
    if len(text) <= limit:
        return text
    end = f"... sha256:{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    return text[: limit - len(end)] + end


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested mapping -> {"a.b": text}: no secrets, no value above `MAX_VALUE` characters.

    Lists become one JSON value. Values that are None are kept as "None": an absent parameter says nothing.
    """
    flat: dict[str, str] = {}
    for key, value in params.items():
        # A key may be a glob (ranks by layer), which MLflow refuses in a name.
        name = f"{prefix}{_NO_NAME.sub('_', str(key))}"
        if is_secret(str(key)):
            continue
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        elif isinstance(value, list | tuple):
            flat[name] = shorten(json.dumps(scrub(value), sort_keys=True, default=str))
        else:
            flat[name] = shorten(scrub_text(str(value)))
    return flat


def one_line(error: BaseException) -> str:
    """An error's text without line breaks."""
    return " ".join(str(error).split())
