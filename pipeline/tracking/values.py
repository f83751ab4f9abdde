"""Parameters and tags of MLflow: a flat map of short strings without secrets.

Nested settings are flattened with dots, and long values are cut with a digest of the whole.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from pipeline.scrub import is_secret, scrub, scrub_text

MAX_VALUE = 500  # MLflow's older servers refuse longer parameters
_NO_NAME = re.compile(r"[^\w .:/-]")


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
