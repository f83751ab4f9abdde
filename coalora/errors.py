"""One error for every bad input: the rule, what was got, what was expected, and what to do instead."""

from __future__ import annotations


class CoaloraError(ValueError):
    """Bad input, said so that the reader can mend it without opening the source.

    Args:
        rule: the rule that was broken, as a sentence without a full stop.
        got: what was given.
        expected: what is accepted.
        remedy: what to write or run instead.
    """

    def __init__(self, rule: str, *, got: object = None, expected: object = None, remedy: str | None = None) -> None:
        self.rule, self.got, self.expected, self.remedy = rule, got, expected, remedy
        parts = [rule]
        parts += [f"got: {got}"] if got is not None else []
        parts += [f"expected: {expected}"] if expected is not None else []
        parts += [f"remedy: {remedy}"] if remedy else []
        super().__init__("; ".join(parts))

    def __reduce__(self) -> tuple[object, ...]:
        # The default rebuilds an exception from its rendered text alone and would lose the keyword parts.
        return _rebuild, (type(self), self.rule, self.got, self.expected, self.remedy)


def _rebuild(cls: type[CoaloraError], rule: str, got: object, expected: object, remedy: str | None) -> CoaloraError:
    return cls(rule, got=got, expected=expected, remedy=remedy)
