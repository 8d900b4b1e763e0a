"""What the documentation shows runs, and what is rendered from code is up to date."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import structlog
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
_LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_code_block_runs(page: Path) -> None:
    document = Sybil(parsers=[PythonCodeBlockParser()], path=str(page.parent)).parse(page)
    shown = page.read_text().count("```python")
    examples = list(document.examples())
    assert len(examples) >= shown
    try:
        for example in examples:
            example.evaluate()
    finally:
        structlog.reset_defaults()


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_link_within_the_repository_leads_somewhere(page: Path) -> None:
    missing = [link for link in _LINK.findall(page.read_text()) if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize(("page", "module"), [("wire.md", "wire_page"), ("idempotency-machine.md", "machine_page")])
def test_a_page_that_is_rendered_from_a_table_is_up_to_date(page: str, module: str) -> None:
    command = [sys.executable, "-m", f"docs.{module}"]
    rendered = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert (ROOT / "docs" / page).read_text() == rendered.stdout, "Run ./dev docs."


def test_the_readme_runs_both_doors_and_names_the_two_commands() -> None:
    readme = (ROOT / "README.md").read_text()
    assert "./dev run" in readme
    assert "./dev tour" in readme
    assert readme.count("```python") == 4
