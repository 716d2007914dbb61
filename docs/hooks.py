"""What the site is made of besides its pages: the command line's reference, notebooks, and formulas as MathML."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

FORMULA = re.compile(r'(<(?:span|div) class="arithmatex">)\\[(\[](.*?)\\[)\]](</(?:span|div)>)', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the page of the command line, and one for each notebook."""
    files.append(File.generated(config, "cli.md", content="\n".join(_reference())))
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        page = Path(notebook.src_uri).with_suffix(".md").as_posix()
        files.append(File.generated(config, page, content=_notebook(Path(notebook.abs_src_path))))
    return files


def on_page_content(html: str, **_: Any) -> str:
    """Browsers show MathML themselves; no script has to be fetched."""

    def formula(match: re.Match[str]) -> str:
        display = "block" if match[1].startswith("<div") else "inline"
        return match[1] + convert(unescape(match[2]).strip(), display=display) + match[3]

    return FORMULA.sub(formula, html)


def _notebook(path: Path) -> str:
    title, *cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = ["".join(title["source"]), f"[Download the notebook]({path.name}){{ download }}"]
    for cell in cells:
        text = "".join(cell["source"])
        parts.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text)
    return "\n\n".join(parts)


def _reference() -> list[str]:
    from clover.command.cli import app

    lines = ["# Command line", "", "Made from the commands themselves.", ""]
    for path, command in _commands("clover", typer.main.get_command(app)):
        arguments = [p for p in command.params if not p.opts[0].startswith("-")]
        options = [p for p in command.params if p.opts[0].startswith("-")]
        usage = " ".join([path, *(p.metavar for p in arguments), "[OPTIONS]"])
        entries = [_entry(p) for p in (*arguments, *options)]
        lines += [f"## {path}", "", command.help or "", "", "```", usage, "```", "", *entries, ""]
    return lines


def _commands(path: str, command: Any) -> list[tuple[str, Any]]:
    if not hasattr(command, "commands"):
        return [(path, command)]
    return [found for name, sub in command.commands.items() for found in _commands(f"{path} {name}", sub)]


def _entry(parameter: Any) -> str:
    is_option = parameter.opts[0].startswith("-")
    name = f"{parameter.opts[0]} {_values(parameter)}".rstrip() if is_option else parameter.metavar
    return f"- `{name}`: {parameter.help or ''}{_default(parameter)}"


def _values(option: Any) -> str:
    kind = option.type_descriptor.annotation
    choices = "|".join(get_args(kind)) if get_origin(kind) is Literal else ""
    return "" if option.is_flag else choices or option.metavar


def _default(parameter: Any) -> str:
    told = parameter.show_default if isinstance(parameter.show_default, str) else parameter.default
    return "" if told is None or told is False or parameter.required else f" Default: {told}."
