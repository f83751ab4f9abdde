"""YAML of settings, parsed to one meaning or refused.

Prefect and PyYAML read YAML 1.1, DVC reads 1.2: what these two take for different numbers (`010` is 8 or 10, `1:30` is
90 or a text) is refused, and so is a key that is given twice, of which parsers silently keep the last.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml

from coalora.errors import CoaloraError

_AMBIGUOUS = re.compile(r"[-+]?0[0-9_]+|[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
_MOST_VALUES = 100_000  # with aliases written out: a few hundred bytes of them can stand for gigabytes


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader without ambiguous numbers and repeated keys."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return node

    def compose_scalar_node(self, anchor: Any) -> Any:
        node = super().compose_scalar_node(anchor)
        if node.tag.endswith((":int", ":float")) and _AMBIGUOUS.fullmatch(node.value):
            raise yaml.MarkedYAMLError(
                problem=f"{node.value} is another number to YAML 1.1 than to 1.2: write it in decimal digits without a "
                "leading zero, or quote a text",
                problem_mark=node.start_mark,
            )
        return node


def parse_yaml(text: str, where: str) -> Any:
    """The value that YAML text stands for.

    Raises:
        CoaloraError: it is no YAML, means two things, refers to itself, or holds more values than settings ever have.

    Example:
        >>> parse_yaml("budgets: [2.5, 3]", "the file")
        {'budgets': [2.5, 3]}
    """
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise _refused(where, place + " ".join(problem.split())) from error
    except RecursionError as error:
        raise _refused(where, "it is nested too deeply") from error
    except ValueError as error:  # a date that is none, a number of thousands of digits
        raise _refused(where, str(error)) from error
    finally:
        if loader is not None:
            loader.dispose()


def _count(node: yaml.Node) -> None:
    """Refuse a document with too many values, aliases written out, or one that refers to itself."""
    sizes: dict[int, int | None] = {}  # None while what is below a node is being counted

    def size(at: yaml.Node) -> int:
        if id(at) not in sizes:
            sizes[id(at)] = None
            sizes[id(at)] = 1 + sum(map(size, _below(at)))
        found = sizes[id(at)]
        if found is None or found > _MOST_VALUES:
            words = "an alias refers to what holds it" if found is None else f"more than {_MOST_VALUES:,} values"
            raise yaml.MarkedYAMLError(problem=words, problem_mark=at.start_mark)
        return found

    size(node)


def _below(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        for pair in node.value:
            yield from pair
    elif isinstance(node, yaml.SequenceNode):
        yield from node.value


def _refused(where: str, problem: str) -> CoaloraError:
    return CoaloraError(f"{where} is not YAML in UTF-8 ({problem[:200]})", remedy="Correct it there")
