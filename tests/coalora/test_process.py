"""Commands set the variables of their process in time, and no others' choice is overruled."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_NAMES = ("GOMP_SPINCOUNT", "TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS")
_PROBE = f"""
import os, sys
from coalora.cli import main
main(["--version"])
print("torch" in sys.modules, *map(os.environ.get, {_NAMES}))
"""


@pytest.mark.parametrize(("given", "expected"), [({}, "False 3000 1 1"), ({"GOMP_SPINCOUNT": "7"}, "False 7 1 1")])
def test_a_command_sets_what_the_user_has_not_before_torch_is_imported(given: dict[str, str], expected: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in _NAMES} | given
    done = subprocess.run([sys.executable, "-c", _PROBE], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == expected
