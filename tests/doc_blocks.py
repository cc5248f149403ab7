"""The code of a page, block by block. `python tests/doc_blocks.py` counts the blocks and lists what is not run.

A block is run as it stands unless an invisible comment before it says otherwise:

    <!-- not run: why -->                       what needs the network, a GPU or an hour
    <!-- run with: {4_000_000: 4_000} -->       the same, smaller: what is written here for what is shown
    <!-- run with: {add: --set lr=1e-2} -->     the same, with this at the end of every command
    <!-- file: my_method.py -->                 kept as a file, for the commands that follow
    <!-- python                                 a step that the reader has behind him and the page does not show
    patch.save("patches/mine") -->
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
PAGES = {str(page.relative_to(ROOT)): page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]}
RUN = ("python", "sh", "yaml", "json")
SHOWN = ("text",)
"""What a program says, and no program."""
_SHELLS = ("", "sh", "bash", "shell")
_PART = re.compile(r"^<!--[ \n]*(?P<comment>.*?)-->|^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```", re.M | re.S)


@dataclass(frozen=True)
class Block:
    language: str
    """python, sh, yaml, json or text."""
    code: str
    """As it is run."""
    line: int
    """Where it begins on its page, counted from 1."""
    not_run: str | None = None
    """Why."""
    file: str | None = None
    """What it is kept as, where it is a file."""
    hidden: bool = False

    @property
    def is_run(self) -> bool:
        return self.language in RUN and self.not_run is None


@dataclass
class _Notes:
    """What the comments before a block say of it."""

    not_run: str | None = None
    file: str | None = None
    smaller: dict[str, str] = field(default_factory=dict)


def blocks(text: str) -> list[Block]:
    """Of a page's Markdown. Raises ValueError for a comment that says of no block, or of a block what is not so."""
    found, notes = [], _Notes()
    for part in _PART.finditer(text):
        line = text.count("\n", 0, part.start()) + 1
        if part["comment"] is not None:
            head, _, rest = part["comment"].partition("\n")
            if head.strip() in RUN:
                found.append(Block(head.strip(), rest, line, hidden=True))
            else:
                _note(notes, part["comment"], line)
            continue
        language = "sh" if part["language"] in _SHELLS else part["language"]
        if language not in (*RUN, *SHOWN):
            raise ValueError(f"line {line}: nothing runs {language!r}; known: {', '.join((*RUN, *SHOWN))}")
        found.append(Block(language, _smaller(part["code"], notes.smaller, line), line, notes.not_run, notes.file))
        notes = _Notes()
    if notes != _Notes():
        raise ValueError(f"a comment is of no block: {notes}")
    return found


def commands(code: str) -> list[str]:
    """The lines of a shell block, a broken one joined, without empty ones and comments."""
    lines = (line.strip() for line in code.replace("\\\n", " ").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def _note(notes: _Notes, comment: str, line: int) -> None:
    verb, colon, rest = comment.strip().partition(":")
    if not colon or verb not in ("not run", "file", "run with"):
        raise ValueError(f"line {line}: no comment begins with {comment!r}; known: not run, run with, file, python, sh")
    if verb == "not run":
        notes.not_run = rest.strip()
    elif verb == "file":
        notes.file = rest.strip()
    else:
        notes.smaller = {str(k): str(v) for k, v in yaml.load(rest, yaml.BaseLoader).items()}


def _smaller(code: str, changes: dict[str, str], line: int) -> str:
    for shown, run in changes.items():
        if shown == "add":
            code = "".join(f"{command.partition(' #')[0].rstrip()} {run}\n" for command in commands(code))
        elif shown not in code:
            raise ValueError(f"line {line}: {shown!r} is not in the block, so nothing can be run for it")
        else:
            code = code.replace(shown, run)
    return code


def main() -> None:
    all_blocks = [(name, block) for name, page in PAGES.items() for block in blocks(page.read_text())]
    seen = [(name, block) for name, block in all_blocks if not block.hidden]
    run = sum(block.is_run for _, block in seen)
    shown = sum(block.language in SHOWN for _, block in seen)
    lines = [
        f"{len(seen)} blocks on {len(PAGES)} pages: {run} run, {shown} of output, {len(seen) - run - shown} not run:"
    ]
    lines += [f"  {name}:{block.line}: {block.not_run}" for name, block in seen if block.not_run]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
