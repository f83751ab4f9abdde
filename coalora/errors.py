"""Errors of bad input: what is wrong, and what to do about it."""

from __future__ import annotations


class CoaloraError(ValueError):
    """Bad input or a broken surrounding, told so that the reader can mend it without opening the source.

    Rendered as "<problem>. <remedy>.": one or two lines.

    Args:
        problem: what is wrong, with the value that is wrong; a sentence without its full stop.
        remedy: what to write or to run instead; an imperative sentence without its full stop.

    Example:
        >>> print(CoaloraError("Layer 'fc' has no weight", remedy="Leave it out of target_modules"))
        Layer 'fc' has no weight. Leave it out of target_modules.
    """

    def __init__(self, problem: str, *, remedy: str | None = None) -> None:
        self.problem, self.remedy = problem, remedy
        sentences = [problem, *([remedy] if remedy else [])]
        super().__init__(" ".join(s if s.endswith((".", "?", "!")) else f"{s}." for s in sentences))

    def __reduce__(self) -> tuple[object, ...]:
        # The default rebuilds an exception from its rendered text alone and would lose the parts.
        return _rebuild, (type(self), self.problem, self.remedy)


def _rebuild(cls: type[CoaloraError], problem: str, remedy: str | None) -> CoaloraError:
    return cls(problem, remedy=remedy)
