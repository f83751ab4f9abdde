"""Table of a device's latencies, measured there, as CSV.

Columns: `layer` (a layer's kind or name; globs and suffixes as in target_modules), the choice (`choice`, as it prints,
globs allowed; or columns named by fields, blank for any value) and `microseconds`. Every layer and choice of the run is
given by exactly one row; rows for others are passed over, so that one table serves many runs:

    layer,choice,microseconds            layer,scheme,bits,group_size,microseconds
    mlp.up_proj,int4 g64 sym,81.5        *_proj,int,4,64,81.5
"""

from __future__ import annotations

import csv
import math
from fnmatch import fnmatchcase
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from coalora.errors import CoaloraError
from coalora.models.targets import TargetLayer, matches
from coalora.quant.space import ChoiceSpace

_MOST = 1e12  # microseconds: more than a week for one layer


def read_latency(
    path: Path, layers: list[TargetLayer], space: ChoiceSpace, allowed: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Microseconds (N, K) of every layer under every allowed choice, 0 elsewhere.

    Raises:
        CoaloraError: no such file, no CSV, unknown or missing columns; a number that is none, negative or infinite; a
            layer and choice given twice or not at all. Line numbers are named.
    """
    header, rows = _rows(path)
    fields = [name for name in header if name not in ("layer", "choice", "microseconds")]
    known = ["scheme", *dict.fromkeys(name for scheme in space.schemes for name in scheme.field_values)]
    unknown = [name for name in fields if name not in known] or len(set(header)) < len(header)
    if {"layer", "microseconds"} - set(header) or unknown or ("choice" in header) == bool(fields):
        raise CoaloraError(
            f"The latency table {path} has the columns {', '.join(header)[:300] or '(none)'}",
            remedy=f"Write layer,choice,microseconds, or in place of choice some of {', '.join(known)}",
        )
    choices = [{"scheme": space.scheme_of(k).name, **c.as_dict()} for k, c in enumerate(space.choices)]
    names, may = list(map(str, space.choices)), allowed.tolist()

    # A table has hundreds of thousands of rows, and few words in them: each is matched once.
    @cache
    def layers_of(pattern: str) -> list[int]:
        return [i for i, at in enumerate(layers) if fnmatchcase(at.kind, pattern) or matches(at.name, pattern)]

    @cache
    def choices_of(words: tuple[str, ...]) -> list[int]:
        if "choice" in header:
            return [k for k, name in enumerate(names) if fnmatchcase(name, words[0])]
        given = {name: word for name, word in zip(fields, words, strict=True) if word}
        return [k for k, choice in enumerate(choices) if all(str(choice.get(n)) == word for n, word in given.items())]

    at_layer, at_value = header.index("layer"), header.index("microseconds")
    at_choice = [header.index(name) for name in (["choice"] if "choice" in header else fields)]
    table, line_of = np.zeros(allowed.shape), np.zeros(allowed.shape, dtype=np.int64)
    for line, cells in rows:
        value = _microseconds(cells[at_value], path, line)
        for at in layers_of(cells[at_layer]):
            for k in choices_of(tuple(cells[i] for i in at_choice)):
                if not may[at][k]:
                    continue
                if line_of[at, k]:
                    raise CoaloraError(
                        f"lines {line_of[at, k]} and {line} of {path} both give {layers[at].name} under "
                        f"{space.describe(k)}",
                        remedy="Make one of the two rows narrower, or leave it out",
                    )
                table[at, k], line_of[at, k] = value, line
    if (absent := allowed & (line_of == 0)).any():
        pairs = [f"{layers[at].kind} under {space.describe(int(k))}" for at, k in np.argwhere(absent)]
        raise CoaloraError(
            f"{path} has no row for {'; '.join(list(dict.fromkeys(pairs))[:3])} ({absent.sum()} pairs in all)",
            remedy="Measure these too, or leave such choices out of the run",
        )
    return table


def _rows(path: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header, and the rows that are not blank with their line numbers; a file is read once while it stays as it is."""
    if not path.is_file():
        raise CoaloraError(f"The latency table {path} does not exist", remedy="Correct cost.table")
    stat = path.stat()
    return _read(path.resolve(), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1)
def _read(path: Path, size: int, time: int) -> tuple[list[str], list[tuple[int, list[str]]]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if any(cells)]
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise CoaloraError(f"{path} is no CSV in UTF-8 ({error})", remedy="Correct the latency table") from error
    header = lines[0][1] if lines else []
    for line, cells in lines[1:]:
        if len(cells) != len(header):
            raise CoaloraError(
                f"line {line} of {path} has {len(cells)} cells for {len(header)} columns ({', '.join(header)[:300]})",
                remedy="Complete the line",
            )
    return header, lines[1:]


def _microseconds(text: str, path: Path, line: int) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= _MOST or "_" in text:
        raise CoaloraError(
            f"the microseconds {text[:100]!r} of {path}, line {line} are no finite number from 0 on",
            remedy=f"Write them as 81.5, at most {_MOST:g}",
        )
    return value
