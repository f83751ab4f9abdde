"""Code that settings and files name: it runs only where a variable of this machine's environment agrees.

Settings arrive by strangers' files and by forms, bundles and bases by downloads: none of them can set the variable.
What a program names in its own calls needs no agreement.
"""

from __future__ import annotations

import os

from coalora.errors import CoaloraError

TRUST_VARIABLE = "COALORA_TRUST_CODE"


def require_trust(what: str) -> None:
    """Refuse `what` unless `COALORA_TRUST_CODE=1`.

    Args:
        what: the setting or name, and the code that it would run.

    Raises:
        CoaloraError: the variable is not set.

    Example:
        >>> from coalora.trust import require_trust
        >>> require_trust("The scheme 'os:x' would import os")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        coalora.errors.CoaloraError: The scheme 'os:x' would import os, and COALORA_TRUST_CODE is not 1 on...
    """
    if os.environ.get(TRUST_VARIABLE) != "1":
        raise CoaloraError(
            f"{what}, and {TRUST_VARIABLE} is not 1 on this machine",
            remedy=f"Read that code, then set {TRUST_VARIABLE}=1 in the environment of the run (and of its worker)",
        )
