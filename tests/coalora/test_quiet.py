"""Commands show lines of their own, and no bars of other packages."""

from __future__ import annotations

import subprocess
import sys


def test_commands_switch_off_the_bars_of_what_they_import() -> None:
    code = (
        "import coalora.cli, sys\n"
        "coalora.cli.main(['--help'])\n"
        "from transformers.utils import logging\n"
        "from tqdm.auto import tqdm\n"
        "list(logging.tqdm(range(3))), list(tqdm(range(3)))\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
