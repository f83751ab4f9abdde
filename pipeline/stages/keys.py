"""Cache key of a pipeline stage: what it is asked for, and all the code that answers.

Prefect's own policies hash the body of the task alone (`TASK_SOURCE`), so that an edit in the library
returns stale results, or the run id (`DEFAULT`), so that nothing is ever reused. Here the key covers every
file of ours that the stage's module reaches by imports, the versions of the numerical packages, the content
of the inputs, and the source of what these name in the registries that another package has added.

Code is compared as a syntax tree without docstrings: comments and formatting do not retrain. Computed module
names (`import_module(f"coalora.{name}")`) cannot be followed; a name written out as a string is, also as
``module:attribute``.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from coalora.errors import CoaloraError
from coalora.files import digest
from coalora.recipes import Recipe
from coalora.registry import added_modules
from pipeline.store.artifacts import Artifact

PACKAGES = ("coalora", "pipeline", "tasks")
VERSIONED = ("torch", "transformers", "peft", "numpy", "scipy", "gptqmodel")  # absent ones count as such

# Plumbing around the stages: editing it must not retrain.
EXCLUDED = (
    "coalora",  # its __init__ alone, which names every module
    "pipeline.environment",
    "pipeline.faults",
    "pipeline.orchestration*",
    "pipeline.progress",
    "pipeline.prune*",
    "pipeline.s3*",
    "pipeline.scrub",
    "pipeline.settings.sections*",  # fields and checks alone; their values are inputs of the stages
    "pipeline.stages*",
    "pipeline.store*",
    "pipeline.tracking*",
    "pipeline.versioning*",
    "pipeline.workers*",
)

_DOTTED = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+)(?::[A-Za-z_]\w*)?")


def source_closure(module: str | Path, packages: Sequence[str] = PACKAGES) -> dict[str, Path]:
    """Modules that one reaches by import statements, itself included, and their files.

    Followed: imports at the top, inside functions and under `TYPE_CHECKING`; the `__init__.py` files on the
    way; modules named by a string. Only modules of `packages` are followed, and none of `EXCLUDED`.

    Args:
        module: dotted name, or a file (of a package or not).
        packages: top-level packages; looked for beside the module's own first, then on the import path.
    """
    root, name, file = _start(module)
    found, pending = {name: file}, [name]
    while pending:
        current = pending.pop()
        file = found[current]
        package = current if file.name == "__init__.py" else current.rpartition(".")[0]
        for target in _targets(file.read_bytes(), package, tuple(packages)):
            parts = target.split(".")
            for length in range(1, len(parts) + 1):
                step = ".".join(parts[:length])
                if step in found or any(fnmatchcase(step, pattern) for pattern in EXCLUDED):
                    continue
                if (located := _locate(step, root)) is not None:
                    found[step] = located
                    pending.append(step)
    return found


def source_digest(module: str | Path, packages: Sequence[str] = PACKAGES) -> str:
    """sha256 over (module name, code) of `source_closure`; the same wherever the checkout lies."""
    files = sorted(source_closure(module, packages).items())
    return digest([[name, _parse(file.read_bytes())[1]] for name, file in files])


def function_source_digest(function: Callable[..., Any], packages: Sequence[str] = PACKAGES) -> str:
    """`source_digest` of the module that defines the function."""
    plain = inspect.unwrap(function)
    try:
        file = inspect.getsourcefile(plain)
    except TypeError:
        file = None
    if file is None or not Path(file).is_file():
        raise CoaloraError(f"Stage function {function!r} has no source file", remedy="Define it in a module")
    return source_digest(Path(file), packages)


def stage_key(stage: str, function: Callable[..., Any], inputs: Mapping[str, Any], *, source: str | None = None) -> str:
    """`<stage>-<sha256>` of the stage's name, code, package versions and inputs.

    Args:
        inputs: by argument: pydantic models, dataclasses, `Artifact` (digest and kind count, not `meta`), str, int,
            finite float, bool, None, and lists and str-keyed dicts of these.
        source: digest of the code; `function_source_digest(function)` by default.

    Raises:
        TypeError: an input is of another type; names the argument.
    """
    canonical = {name: _canonical(value, name) for name, value in inputs.items()}
    added = sorted({module for text in strings(canonical) for module in added_modules(text)})
    material = {
        "stage": stage,
        "source": source if source is not None else function_source_digest(function),
        "added": {module: source_digest(module, (*PACKAGES, module.split(".")[0])) for module in added},
        "versions": versions(),
        "inputs": canonical,
    }
    return f"{stage}-{digest(material)}"


def artifacts_in(inputs: Mapping[str, Any]) -> Iterator[tuple[str, Artifact]]:
    """(argument, artifact) of every artifact among the inputs, inside lists and dicts too."""

    def walk(where: str, value: Any) -> Iterator[tuple[str, Artifact]]:
        if isinstance(value, Artifact):
            yield where, value
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                yield from walk(f"{where}[{index}]", item)
        elif isinstance(value, Mapping):
            for key, item in value.items():
                yield from walk(f"{where}[{key!r}]", item)
        elif is_dataclass(value):
            for field in fields(value):
                yield from walk(f"{where}.{field.name}", getattr(value, field.name))

    for name, value in inputs.items():
        yield from walk(name, value)


def _canonical(value: Any, where: str) -> Any:
    """JSON of one input. `where` is how an error calls it."""
    if isinstance(value, Artifact):
        return {"artifact": value.digest, "kind": value.kind}
    if isinstance(value, Recipe):
        return value.to_dict()
    if isinstance(value, BaseModel):
        nested = next(artifacts_in({f"{where}.{name}": field for name, field in value}), None)
        if nested is not None:  # its `meta` would get into the key, and its bytes past the check
            raise TypeError(f"input {nested[0]!r}: an Artifact is hidden in a model; make it an argument of its own")
        return value.model_dump(mode="json")
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _canonical(getattr(value, f.name), f"{where}.{f.name}") for f in fields(value)}
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, list | tuple):
        return [_canonical(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _canonical(item, f"{where}[{key!r}]") for key, item in value.items()}
    raise TypeError(
        f"input {where!r} of type {type(value).__name__} ({value!r:.80}) cannot be part of a cache key; "
        "give a pydantic model, dataclass, Artifact, str, int, finite float, bool, None, list or str-keyed dict"
    )


def strings(value: Any) -> Iterator[str]:
    """Strings among the values of canonical inputs."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from strings(item)


def _start(module: str | Path) -> tuple[Path, str, Path]:
    """(folder of the top-level package, module name, file) of where to start."""
    if isinstance(module, str):
        spec = find_spec(module)
        if spec is None or spec.origin is None:
            raise CoaloraError(f"There is no module {module!r} to digest", remedy="Correct its name")
        module = Path(spec.origin)
    file = module.resolve()
    if not file.is_file():
        raise CoaloraError(f"There is no module file {module}", remedy="Correct its path")
    parts = [] if file.name == "__init__.py" else [file.stem]
    folder = file.parent
    while (folder / "__init__.py").is_file():
        parts.insert(0, folder.name)
        folder = folder.parent
    return folder, ".".join(parts), file


def _locate(module: str, root: Path) -> Path | None:
    """File of a module, without importing it. None for `from module import function`."""
    top, *rest = module.split(".")
    base = root
    # A package, not just a folder of that name: tests/coalora must not hide coalora.
    if not (root / top / "__init__.py").is_file() and not (root / f"{top}.py").is_file():
        spec = find_spec(top)
        if spec is None or spec.origin is None:
            return None
        base = Path(spec.origin).resolve().parent
        base = base.parent if spec.submodule_search_locations else base
    path = base.joinpath(top, *rest)
    for file in (path / "__init__.py", path.with_name(path.name + ".py")):
        if file.is_file():
            return file.resolve()
    return None


@lru_cache(maxsize=4096)
def _targets(source: bytes, package: str, packages: tuple[str, ...]) -> tuple[str, ...]:
    """Names in `packages` that a file of `package` mentions: modules, and perhaps names inside them."""
    found = []
    for level, name in _parse(source)[0]:
        with suppress(ImportError):  # beyond the top-level package: Python refuses it as well
            found.append(resolve_name("." * level + name, package or None))
    return tuple(target for target in found if target.split(".")[0] in packages)


@lru_cache(maxsize=4096)
def _parse(source: bytes) -> tuple[tuple[tuple[int, str], ...], str]:
    """((level, dotted name) of everything imported, digest of the code)."""
    tree = ast.parse(source)
    imports: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            imports += [(node.level, ".".join([*base, alias.name])) for alias in node.names]
        elif isinstance(node, ast.Constant) and (dotted := _DOTTED.fullmatch(str(node.value))):
            imports.append((0, dotted[1]))  # registries of lazily imported modules
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            _drop_docstring(node)
    code = ast.dump(tree, annotate_fields=False)
    return tuple(dict.fromkeys(imports)), hashlib.sha256(code.encode("utf-8", "surrogatepass")).hexdigest()


def _drop_docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
    first = node.body[0] if node.body else None
    value = first.value if isinstance(first, ast.Expr) else None
    if isinstance(value, ast.Constant) and isinstance(value.value, str):
        node.body = node.body[1:]


def versions() -> dict[str, str | None]:
    """Versions of the packages that decide numbers."""
    return {name: _version(name) for name in VERSIONED}


@lru_cache(maxsize=64)  # the metadata of a package is a file that is read and parsed whole
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
