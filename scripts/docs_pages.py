"""Pages of the site that are no files of docs/: the README as the first, one for each error and each room of the API.

A hook of mkdocs. The API is what ``concept_unlearn/__init__.py`` exports, read from its text: nothing is imported.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGE = "concept_unlearn"


def exported(root: Path = ROOT) -> dict[str, dict[str, str]]:
    """Room -> public name -> where it is defined, both in the order of the imports."""
    rooms: dict[str, dict[str, str]] = {}
    for line in ast.parse((root / PACKAGE / "__init__.py").read_text()).body:
        if isinstance(line, ast.ImportFrom) and line.module:
            room = rooms.setdefault(line.module.partition(".")[0], {})
            room |= {name.asname or name.name: f"{PACKAGE}.{line.module}.{name.name}" for name in line.names}
    return rooms


def api_page(room: str, names: dict[str, str], root: Path = ROOT) -> str:
    """What the room says of itself, then each of its public names."""
    source = root / PACKAGE / room / "__init__.py"
    source = source if source.is_file() else root / PACKAGE / f"{room}.py"
    about = ast.get_docstring(ast.parse(source.read_text())) or ""
    about = about.partition("\n\n")[0]
    return "\n\n".join([f"# {room}", about, *(f"::: {path}" for path in names.values())]) + "\n"


def first_page(root: Path = ROOT) -> str:
    """The README, its links as they are from within docs/."""
    return (root / "README.md").read_text().replace("](docs/", "](")


def error_pages(root: Path = ROOT) -> dict[str, str]:
    """Error -> its section of docs/errors.md as a page, its links as they are from within docs/errors/."""
    parts = (root / "docs" / "errors.md").read_text().split("\n## ")[1:]
    upward = (re.sub(r"\]\((?!\w+:|#)", "](../", part) for part in parts)
    return {part.partition("\n")[0].strip(): f"# {part}" for part in upward}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Comments that say how a block is tried out are for the tests; an error is found on its own page alone."""
    if page.file.src_path == "errors.md":
        page.meta["search"] = {"exclude": True}
    return re.sub(r"^<!--.*?-->\n+", "", markdown, flags=re.M | re.S)


def on_config(config: Any) -> Any:
    (errors,) = (part["Errors"] for part in config.nav if "Errors" in part)
    errors.extend({name: f"errors/{name}.md"} for name in error_pages())
    config.nav.append({"API": [{room: f"api/{room}.md"} for room in exported()]})
    return config


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    files.append(File.generated(config, "index.md", content=first_page()))
    for name, content in error_pages().items():
        files.append(File.generated(config, f"errors/{name}.md", content=content))
    for room, names in exported().items():
        files.append(File.generated(config, f"api/{room}.md", content=api_page(room, names)))
    return files
