"""Commands of `coalora` in this process: their exit code is checked, and what they say is returned."""

from __future__ import annotations

from contextlib import redirect_stderr
from io import StringIO

from coalora.cli import main


def refused(*arguments: object) -> str:
    """The message of a command that must end with 2, in at most two lines and without a traceback."""
    with redirect_stderr(StringIO()) as told:
        assert main([str(a) for a in arguments]) == 2
    text = told.getvalue().strip()
    assert text.startswith("error: ")
    assert "Traceback" not in text
    return text
