"""Dependencies point one way: dvc.yaml and pipelines.yaml -> flows -> tasks -> coalora, and coalora runs alone."""

from __future__ import annotations

import ast
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
ORCHESTRATION = ("prefect", "mlflow", "dvc", "boto3", "botocore", "s3fs", "moto", "distributed", "ray")
# The wheel names none of these either.
PIPELINE_ONLY = ("pydantic", "pandas", "datasets", "matplotlib", "jinja2", "rich", "fastapi")
OURS = ("coalora", "pipeline", "tasks", "flows", "tests", "benchmarks")
# What coalora may import at the top: the wheel's dependencies, and what they bring with them for certain.
WHEEL = {
    "yaml",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "numpy",
    "scipy",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
    "typer",
}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imported(path: Path, *, top_level: bool = False) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of every import statement; with `top_level` only those that run at import."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes: list[ast.AST] = list(_at_import(tree)) if top_level else list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "." * node.level, node.lineno


def _at_import(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        checking = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
        if checking or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        yield child
        yield from _at_import(child)


def breaches(package: str, forbidden: tuple[str, ...], *, top_level: bool = False) -> list[str]:
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in modules(package)
        for name, line in imported(path, top_level=top_level)
        if name.split(".")[0] in forbidden
    ]


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("coalora", (*ORCHESTRATION, "pipeline", "tasks", "flows", "infra", "tests", "benchmarks")),
        ("pipeline", ("tasks", "flows", "infra", "tests", "benchmarks")),
        ("tasks", ("flows", "infra", "tests", "benchmarks")),
        ("flows", ("infra", "tests", "benchmarks")),
        ("infra", ("tests", "benchmarks")),
    ],
)
def test_no_package_imports_what_stands_above_it(package: str, forbidden: tuple[str, ...]) -> None:
    assert breaches(package, forbidden) == []


def test_coalora_imports_only_the_wheels_dependencies_at_import_time() -> None:
    allowed = WHEEL | {"coalora", "__future__"} | set(sys.stdlib_module_names)
    paths = [
        path for path in modules("coalora") if path.name != "triton.py" and "kernels" not in path.parts
    ]  # imported on a GPU alone
    found = {name.split(".")[0] for path in paths for name, _ in imported(path, top_level=True)}
    assert found - allowed == set()
    assert breaches("coalora", PIPELINE_ONLY, top_level=True) == []


def test_imports_are_absolute() -> None:
    relative = [
        n
        for p in ("coalora", "pipeline", "tasks", "flows")
        for f in modules(p)
        for n, _ in imported(f)
        if n.startswith(".")
    ]
    assert relative == []


def test_the_scan_sees_an_import_wherever_it_stands(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import dvc\ntry:\n    import mlflow.pyfunc\n"
        "except ImportError:\n    pass\nclass A:\n    import boto3\n    def f(self):\n        from prefect.x import y\n"
    )
    everywhere = [name for name, _ in imported(file)]
    assert {"dvc", "mlflow.pyfunc", "boto3", "prefect.x"} <= set(everywhere)
    assert [name for name, _ in imported(file, top_level=True)] == ["typing", "mlflow.pyfunc", "boto3"]


def test_flows_are_entered_from_the_two_files_alone() -> None:
    deployments = yaml.safe_load((ROOT / "pipelines.yaml").read_text(encoding="utf-8"))["deployments"]
    for deployment in deployments:
        path, function = deployment["entrypoint"].split(":")
        assert path.startswith("flows/")
        assert f"def {function}(" in (ROOT / path).read_text(encoding="utf-8")
    for stage in yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"].values():
        assert shlex.split(stage["cmd"])[:4] == ["python", "-m", "coalora", "stage"]


def test_dvc_yaml_is_what_the_graph_says() -> None:
    from flows.stage import dvc_yaml

    written = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    assert written == dvc_yaml()
    stages = yaml.safe_load(written)["stages"]
    outputs = {out for stage in stages.values() for out in stage["outs"]}
    for name, stage in stages.items():
        assert set(stage.get("deps", [])) <= outputs
        assert ("outputs/inputs" in stage.get("deps", [])) is (name != "inputs")


def test_subpackages_of_coalora_export_nothing_by_themselves() -> None:
    """Cache keys follow imports file by file: a re-export would tie every key to every file."""
    for init in (ROOT / "coalora").glob("*/**/__init__.py"):  # the keys leave coalora/__init__.py out
        body = ast.parse(init.read_text(encoding="utf-8")).body
        assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) for node in body), init


def test_rooms_import_from_the_librarys_modules() -> None:
    """`from coalora import name` is for users: cache keys follow modules, and would miss what such a name is."""
    assert not [
        f"{path}:{node.lineno}"
        for package in ("coalora", "pipeline", "tasks", "flows", "infra")
        for path in modules(package)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module == "coalora"
    ]
