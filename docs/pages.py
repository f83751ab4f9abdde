"""Pages of the site that are made from the code, as a hook of mkdocs (`make docs`).

Commands come from the command line's own help, settings from their JSON schema, which is made from the recipes, and
the notebook's page from its cells and stored outputs.
"""

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from coalora.cli import command_line
from pipeline.settings.sections import Settings

DOCS = Path(__file__).parent
Schema = dict[str, Any]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    made = {
        "commands.md": commands(),
        "settings.md": settings(),
        "notebook.md": notebook(DOCS / "notebook.ipynb"),
    }
    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_content(html: str, page: Page, **_: Any) -> str:
    """Files of the repository that are no page stay names: the site may stand anywhere."""
    return re.sub(r'<a href="repository:[^"]*">(.*?)</a>', r"\1", html)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put in parts of README.md, with links that hold in the site."""

    def part(match: re.Match[str]) -> str:
        name, section = match[1], match[2]
        whole = (DOCS.parent / name).read_text(encoding="utf-8")
        found = re.search(rf"<!-- {section} -->\n(.*?)<!-- /{section} -->", whole, flags=re.DOTALL)
        if found is None:
            raise ValueError(f"{name} has no part {section!r}, which {page.file.src_uri} includes")
        text = re.sub(r"\[docs/([\w-]+)\.md\]", r"[\1]", found[1])
        return re.sub(r"\]\((?!https?:)([^)]+)\)", lambda link: f"]({address(link[1])})", text)

    def address(path: str) -> str:
        inside = path.removeprefix("docs/")
        is_page = inside != path and files.get_file_from_path(inside.partition("#")[0])
        return inside if is_page else f"repository:{path}"

    return re.sub(r"^<!-- part of (\S+): (\S+) -->$", part, markdown, flags=re.MULTILINE)


# Commands ------------------------------------------------------------------------------------------------------------


def commands() -> str:
    """Every command with its usage, arguments and options, as `--help` has them."""
    top = typer.main.get_command(command_line())
    lines = ["# Commands", "", "Made from the command line itself; `coalora COMMAND --help` says the same.", ""]
    lines += [
        "`adapt`, `inspect`, `compare`, `verify` and `push` come with the package, the others are those of a checkout, "
        "called in its root. Exit codes: 0 done, 1 not as it should be, 2 bad input, 130 interrupted. An option that "
        "shows `...` takes several values: `--set a=1 b=2`.",
        "",
    ]
    return "\n".join([*lines, *_command_lines(top, "coalora")])


def _command_lines(command: Any, path: str) -> Iterator[str]:
    for name, child in getattr(command, "commands", {}).items():
        full = f"{path} {name}"
        if hasattr(child, "commands"):
            yield from _command_lines(child, full)
            continue
        context = child.make_context(full, [], resilient_parsing=True)
        yield from (f"## {full}", "", child.help or "", "", "```", _usage(child, context), "```", "")
        yield from ("| argument or option | meaning |", "| --- | --- |")
        for parameter in child.get_params(context):
            record = parameter.get_help_record(context)
            if record and parameter.name != "help":
                names = parameter.metavar if parameter.param_type_name == "argument" else record[0]
                yield f"| {_code(names)} | {_cell(record[1])} |"
        yield ""


def _usage(command: Any, context: Any) -> str:
    arguments = [p.metavar for p in command.params if p.param_type_name == "argument"]
    options = [
        " ".join([p.opts[0], *([p.metavar] if p.metavar else [])])
        for p in command.params
        if p.param_type_name == "option" and p.required
    ]
    return " ".join([context.command_path, *arguments, *options, "[OPTIONS]"])


# Settings ------------------------------------------------------------------------------------------------------------


def settings() -> str:
    """Every key of a pipeline, by section, from the JSON schema that the form in Prefect's UI is made from, too."""
    schema = Settings.model_json_schema()
    lines = ["# Settings", ""]
    lines += [
        "Every key of a pipeline in `pipelines.yaml`, and of `--set SECTION.KEY=VALUE`; made from the declarations in "
        "`coalora/recipes.py` and `pipeline/settings/sections.py`, whose hyperparameters are those of `CoaLoraConfig`, "
        "too. How they are used together: [Your own model and data](settings-guide.md).",
        "",
    ]
    plain, sections = [], []
    for key, field in schema["properties"].items():
        if (inner := _mapping_of(field, schema)) is None:
            plain.append((key, field))
        else:
            sections.append((key, field, inner))
    lines += ["## At the top", "", *_rows(plain, "", schema["required"], schema)]
    for key, field, inner in sections:
        lines += _section(key, field, inner, schema)
    return "\n".join(lines)


def _section(path: str, field: Schema, inner: Schema, schema: Schema) -> list[str]:
    lines = [f"## {path}" if "." not in path else f"### {path}", "", _words(inner.get("description", "")), ""]
    defaults, plain, below = field.get("default") or {}, [], []
    for key, value in inner["properties"].items():
        if deeper := _mapping_of(value, schema):
            below += _section(f"{path}.{key}", value, deeper, schema)
        else:
            plain.append((key, {**value, **({"default": defaults[key]} if key in defaults else {})}))
    return [*lines, *_rows(plain, f"{path}.", inner.get("required", []), schema), *below]


def _rows(fields: list[tuple[str, Schema]], path: str, required: list[str], schema: Schema) -> list[str]:
    lines = ["| key | meaning | values | default |", "| --- | --- | --- | --- |"]
    for key, field in fields:
        meaning = f"**{_cell(field.get('title', key))}.** {_cell(field.get('description', ''))}"
        default = "required" if key in required else _code(json.dumps(field.get("default")))
        lines.append(f"| `{path}{key}` | {meaning} | {_cell(_type(field, schema))} | {default} |")
    return [*lines, ""]


def _mapping_of(field: Schema, schema: Schema) -> Schema | None:
    """The section that a field holds, if it holds one (or null)."""
    references = [f["$ref"] for f in (field, *field.get("anyOf", []), *field.get("allOf", [])) if "$ref" in f]
    if len(references) != 1:
        return None
    found = schema["$defs"][references[0].rpartition("/")[2]]
    return found if "properties" in found else None


def _type(field: Schema, schema: Schema) -> str:
    if "$ref" in field:
        return _type(schema["$defs"][field["$ref"].rpartition("/")[2]], schema)
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type(option, schema) for option in field["anyOf"]))
    if "enum" in field or "const" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        return f"list of {_type(field['items'], schema)}"
    if field.get("type") == "object":
        if "properties" in field:
            keys = ", ".join(f"`{key}`" for key in field["properties"])
            return f"mapping of {keys}"
        return f"mapping to {_type(field.get('additionalProperties') or {}, schema)}"
    names = {"boolean": "`true`, `false`", "null": "`null`", "string": "text"}
    return names.get(field.get("type", ""), field.get("type", "any"))


# Notebook ------------------------------------------------------------------------------------------------------------


def notebook(path: Path) -> str:
    """Cells of a notebook with their stored outputs; pictures stand in the page."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f'<img alt="Figure" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">')
            else:
                text = "".join(output.get("text") or data["text/plain"]).rstrip()
                parts.append(f'```{{ .text .no-copy title="Output" }}\n{text}\n```')
    return "\n\n".join(parts) + "\n"


def _words(text: str) -> str:
    return html.escape(text, quote=False)


def _cell(text: str) -> str:
    return _words(" ".join(text.split())).replace("|", "\\|").replace("*", "\\*")


def _code(text: str) -> str:
    return f"<code>{_words(text)}</code>".replace("|", "&#124;")  # a backtick would keep the backslash of \|
