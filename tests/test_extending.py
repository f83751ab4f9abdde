"""docs/extending.md: its files make a package with entry points, and its code runs against it."""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path

from tests import preloaded

ROOT = Path(__file__).parents[1]


def test_the_documented_extensions_run(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "extending.md").read_text()
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").touch()
    run = []
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        if named := re.match(r"# (my_package/\w+\.py)\n", block):
            (tmp_path / named[1]).write_text(block)
        else:
            run.append(block)
    assert len(run) == 5
    (toml,) = re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL)
    groups = tomllib.loads(toml)["project"]["entry-points"]
    metadata = tmp_path / "my_package-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1\n")
    lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in groups.items()]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    preloaded.run("-c", "\n".join(run), cwd=tmp_path, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
