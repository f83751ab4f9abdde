"""Record and model card of an export: where it comes from, what it holds, and the sha256 of every file.

`export.json` is written last and binds all other files, packed weights included: a flipped bit is found by
`check_export`. `README.md` is the card that a hub shows. Neither holds a time or a place, so that the same export has
the same bytes wherever it is written.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coalora.errors import CoaloraError
from coalora.export.adapter import BINDING
from coalora.export.base import CONFIGURATION
from coalora.files import check_files, file_digests, folder_nbytes, read_json, write_json

if TYPE_CHECKING:
    from coalora.export.formats import ExportFormat, ExportSource

RECORD, CARD = "export.json", "README.md"
FORMAT = "coalora-export/1"
UNKNOWN = "unknown"


def licence_of(folder: Path) -> str:
    """Licence of a saved model by the card in its folder (`license: apache-2.0` in its head), or `unknown`."""
    for name in ("README.md", "MODEL_CARD.md"):
        if (folder / name).is_file():
            head = (folder / name).read_text(encoding="utf-8", errors="replace")[:20_000].split("---")
            if len(head) > 2 and (found := re.search(r"^license:[ \t]*([\w.+-]{1,60})[ \t]*$", head[1], re.MULTILINE)):
                return found[1]
    return UNKNOWN


def files_of(folder: Path) -> list[str]:
    """Relative paths of an export's files, the record aside."""
    found = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    return sorted(name for name in found if name != RECORD and not name.startswith("."))


def write_record(
    folder: Path, formats: Mapping[str, ExportFormat], source: ExportSource, about: Mapping[str, Any]
) -> None:
    """Write the card and, last, the record of an export whose formats are written.

    Args:
        about: JSON: what the writer knows beyond the source, such as `licence`, `loss` or `run`.
    """
    adapted = source.adapted
    record = {
        "format": FORMAT,
        "formats": {name: made.folder for name, made in formats.items()},
        "average_bits": adapted.content["average_bits"],
        "digest": adapted.digest,
        "base_digest": adapted.content["base_digest"],
        "base_model": name_of(str(adapted.config.base_model_name_or_path)),
        "licence": UNKNOWN,
        **about,
    }
    (folder / CARD).write_text(_card(folder, formats, source, record), encoding="utf-8")
    names, known = files_of(folder), dict[str, str]()
    for name in names:  # large files were digested as they were written
        if Path(name).name in (BINDING, CONFIGURATION):
            told = read_json(folder / name).get("files", {})
            known |= {Path(name).with_name(part).as_posix(): sha256 for part, sha256 in told.items()}
    digests = known | file_digests(folder, [name for name in names if name not in known])
    write_json(folder / RECORD, record | {"files": digests})


def check_export(folder: Path) -> dict[str, Any]:
    """The record of an export, whose files are those that were written: none altered, missing or more.

    Raises:
        CoaloraError: names the first file.
    """
    record = read_json(folder / RECORD)
    if not isinstance(record, dict) or record.get("format") != FORMAT or not isinstance(record.get("files"), dict):
        raise CoaloraError(f"{RECORD} of {folder} is no record of an export ({FORMAT})", remedy="Export again")
    present, written = set(files_of(folder)), set(record["files"])
    if wrong := sorted(present ^ written):
        state = "is not of the export" if wrong[0] in present else "is missing"
        raise CoaloraError(f"{wrong[0]} in {folder} {state}", remedy="Remove it, or export again")
    check_files(folder, record["files"], present)
    return record


def name_of(address: str) -> str:
    """A base model's name without the place where it lies: a hub id as it is, the last part of a path."""
    return address if not Path(address).is_absolute() else Path(address).name


def _card(folder: Path, formats: Mapping[str, ExportFormat], source: ExportSource, record: Mapping[str, Any]) -> str:
    tables, choices = source.tables, source.adapted.choices
    named = record["base_model"] if "/" in str(record["base_model"]) else None
    head = [
        "---",
        *([f"base_model: {named}"] if named else []),
        *([f"license: {record['licence']}"] if record["licence"] != UNKNOWN else []),
        "library_name: peft",
        "tags: [coalora, lora, quantized]",
        "---",
    ]
    counts = Counter(tables.space.describe(int(k)) for k in choices)
    weights = Counter[str]()
    for layer, k in zip(tables.layers, choices, strict=True):
        weights[tables.space.describe(int(k))] += layer.n_weights
    lines = [
        f"# {record['base_model'] or 'Model'} at {record['average_bits']:.2f} bits a weight",
        "",
        f"A quantized base model and the LoRA adapter made for exactly this base by CoA-LoRA: {len(choices)} layers "
        f"with {tables.n_weights:,} weights, quantized layer by layer. Do not merge the adapter into the base.",
        "",
        "| Choice | Layers | Weights |",
        "|---|---|---|",
        *(f"| {choice} | {n} | {weights[choice]:,} |" for choice, n in counts.most_common()),
        "",
        "| Format | Folder | Bytes | Started by |",
        "|---|---|---|---|",
        *(
            f"| {name} | `{made.folder}/` | {folder_nbytes(folder / made.folder):,} | "
            f"{_cell(made.start_line(Path('.')))} |"
            for name, made in formats.items()
        ),
        "",
        f"Licence of the base model: {record['licence']}. Configuration `{record['digest'][:16]}`, base "
        f"`{record['base_digest'][:16]}`. `export.json` holds the sha256 of every file: `coalora verify` checks them.",
    ]
    return "\n".join([*head, "", *lines, ""])


def _cell(line: str) -> str:
    return "<br>".join(f"`{part}`" for part in line.replace("|", "\\|").splitlines() if part) or "-"
