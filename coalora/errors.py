"""Errors of bad input: what is wrong, and what to do about it."""

from __future__ import annotations

import re
import unicodedata

_MOST_QUOTED, _LONGEST_LINE = 200, 2000  # characters
# An apostrophe is no quote: a letter stands before it.
_QUOTED = re.compile(rf"(?<!\w)(['\"])((?:(?!\1)[^\n]){{{_MOST_QUOTED}}})(?:(?!\1)[^\n])+(\1)(?!\w)")
_COLOUR = re.compile(r"(\x1b\[[0-9;]*m)")


def printable(text: str, *, colours: bool = False) -> str:
    """Text of others, such as a path or a name in a file, as a terminal may show it.

    Control characters, which move the cursor or turn the writing around, are escaped; line breaks stay, and colours
    where they are asked for.

    Example:
        >>> from coalora.errors import printable
        >>> print(printable("run \\x1b[2J 2"))
        run \\x1b[2J 2
    """
    if colours and "\x1b" in text:
        return "".join(p if index % 2 else printable(p) for index, p in enumerate(_COLOUR.split(text)))
    if text.isprintable():
        return text
    return "".join(c.encode("unicode_escape").decode() if _controls(c) else c for c in text)


def _controls(character: str) -> bool:
    return character not in "\n\t" and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def _short(text: str) -> str:
    """The text with long quotations and endless lines cut."""
    lines = _QUOTED.sub(r"\1\2...\3", text).split("\n")
    return "\n".join(line if len(line) <= _LONGEST_LINE else f"{line[:_LONGEST_LINE]}..." for line in lines)


class CoaloraError(ValueError):
    """Bad input or a broken surrounding, told so that the reader can mend it without opening the source.

    Rendered as "problem. remedy.": one or two lines, with control characters escaped and at most 200 characters of
    what is quoted.

    Args:
        problem: what is wrong, with the value that is wrong; a sentence without its full stop.
        remedy: what to write or to run instead; an imperative sentence without its full stop.

    Example:
        >>> print(CoaloraError("Layer 'fc' has no weight", remedy="Leave it out of target_modules"))
        Layer 'fc' has no weight. Leave it out of target_modules.
    """

    def __init__(self, problem: str, *, remedy: str | None = None) -> None:
        problem, remedy = _short(printable(problem)), remedy and _short(printable(remedy))
        self.problem, self.remedy = problem, remedy
        sentences = [problem, *([remedy] if remedy else [])]
        super().__init__(" ".join(s if s.endswith((".", "?", "!")) else f"{s}." for s in sentences))

    def __reduce__(self) -> tuple[object, ...]:
        # The default rebuilds an exception from its rendered text alone and would lose the parts.
        return _rebuild, (type(self), self.problem, self.remedy)


def _rebuild(cls: type[CoaloraError], problem: str, remedy: str | None) -> CoaloraError:
    return cls(problem, remedy=remedy)
