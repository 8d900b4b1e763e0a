"""Reads the user's snippets out of ``document.md``, and runs them as they stand."""

import re
from pathlib import Path
from typing import Any

_PAGE = Path(__file__).with_suffix(".md").read_text()
_SECTION = re.compile(r"^## (.+?)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SECTIONS = {match[1]: _BLOCK.findall(match[2]) for match in _SECTION.finditer(_PAGE)}
HEADINGS = tuple(_SECTIONS)


def blocks(heading: str, language: str) -> list[str]:
    """Return the blocks of one language under a heading."""
    return [text for kind, text in _SECTIONS[heading] if kind == language]


def run(heading: str, **set_up: Any) -> dict[str, Any]:
    """Run the Python under a heading where ``set_up`` is known; return all that is known afterwards."""
    (code,) = blocks(heading, "python")
    known = {"__name__": __name__, **set_up}
    exec(compile(code, f"document.md, {heading}", "exec"), known)  # noqa: S102 - that is what is tested
    return known
