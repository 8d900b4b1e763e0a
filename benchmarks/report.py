"""What a benchmark found, as values, and how it is shown: on a terminal, in RESULTS.md. Measures nothing."""

import json
from collections.abc import Iterable, Sequence
from textwrap import wrap
from typing import Any, Literal, NamedTuple

from benchmarks.budgets import PROMISES, Part, Promise, Verdict
from benchmarks.reasons import Missed, missed

Whose = Literal["bare", "ours", "peer"]

_CAPTION = (
    "CPU µs are of the process that is measured, for one operation. Ratios hold within one table of one run only."
)


class Row(NamedTuple):
    """One line of a table: a figure for each column, or a note in their place, such as why there are none."""

    name: str
    figures: tuple[float | None, ...] = ()
    note: str = ""


class Table(NamedTuple):
    """Figures that were taken in turns, so that they may be held against each other; the bare baseline comes first."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""


class Bar(NamedTuple):
    """One bar of the chart."""

    name: str
    length: float
    whose: Whose


class Panel(NamedTuple):
    """Bars of one unit, of which less is better."""

    title: str
    unit: str
    bars: tuple[Bar, ...]


class Section(NamedTuple):
    """What one suite found.

    Args:
        title: of the suite.
        tables: all it found.
        found: the figures that budgets are held against, by the names of ``budgets.PROMISES``.
        panels: what of it is charted.
    """

    title: str
    tables: tuple[Table, ...]
    found: dict[str, float]
    panels: tuple[Panel, ...] = ()


def number(figure: float | None) -> str:
    """Return three digits or more of a figure, or a dash where there is none."""
    if figure is None:
        return "-"
    size = abs(figure)
    return f"{figure:,.0f}" if size >= 100 else f"{figure:.1f}" if size >= 10 else f"{figure:.2f}"


def to_json(section: Section) -> str:
    """Return a section as text that ``from_json`` reads."""
    return json.dumps(section)


def from_json(text: str) -> Section:
    """Read a section."""
    title, tables, found, panels = json.loads(text)
    return Section(
        title,
        tuple(Table(name, tuple(columns), tuple(map(_row, rows)), note) for name, columns, rows, note in tables),
        found,
        tuple(Panel(name, unit, tuple(Bar(*bar) for bar in bars)) for name, unit, bars in panels),
    )


def _row(row: Sequence[Any]) -> Row:
    name, figures, note = row
    return Row(name, tuple(figures), note)


def as_text(table: Table) -> str:
    """Return a table for a terminal."""
    width = max(46, *(len(row.name) + 4 for row in table.rows)) if table.rows else 46
    widths = [max(11, len(column) + 2) for column in table.columns]
    lines = [table.title, " " * width + "".join(map(_right, table.columns, widths))]
    for row in table.rows:
        figures = "".join(map(_right, map(number, row.figures), widths))
        lines.append(f"  {row.name:{width - 2}}{figures}{'  ' if figures and row.note else ''}{row.note}".rstrip())
    return "\n".join([*lines, *([f"  {table.note}"] if table.note else []), ""])


def _right(text: str, width: int) -> str:
    return f"{text:>{width}}"


def as_markdown(table: Table) -> str:
    """Return a table for a page."""
    lines = [f"### {table.title}", ""]
    lines += [_cells(["", *table.columns]), _cells(["---", *("---:" for _ in table.columns)])]
    for row in table.rows:
        figures = [number(figure) for figure in row.figures]
        name = f"{row.name} ({row.note})" if row.note else row.name
        lines.append(_cells([name, *(figures or ["-"] * len(table.columns))]))
    return "\n".join([*lines, "", *([table.note, ""] if table.note else [])])


def _cells(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def budget_table(found: dict[str, float]) -> Table:
    """Hold what was found to every promise of the design; return what came of it, in the design's order."""
    rows = []
    for promise in PROMISES:
        verdict = promise.verdict(found)
        if len(promise.parts) == 1:
            rows.append(_part(promise.what, promise.parts[0], found, verdict))
            continue
        rows.append(Row(promise.what, (None, None), verdict))
        rows += [_part(f"· {part.what}", part, found, part.verdict(found)) for part in promise.parts]
    return Table("Budgets", ("budget", "found"), tuple(rows), tally(PROMISES, found))


def _part(what: str, part: Part, found: dict[str, float], verdict: Verdict) -> Row:
    sign = "≤" if part.most else "≥"
    return Row(f"{what}: {sign} {part.bound:g} {part.unit}".rstrip(), (part.bound, found.get(part.key)), verdict)


def tally(promises: Sequence[Promise], found: dict[str, float]) -> str:
    """Say how many budgets were met, missed and not measured."""
    verdicts = [promise.verdict(found) for promise in promises]
    met, missed = verdicts.count("met"), verdicts.count("MISSED")
    unmeasured = len(verdicts) - met - missed
    return f"{met} of {len(verdicts)} met, {missed} missed" + (f", {unmeasured} not measured" if unmeasured else "")


def as_text_of_missed(late: Missed) -> str:
    """Return why a budget was missed, for a terminal."""
    return "\n".join(wrap(f"MISSED: {late.promise.what}. {late.why}", 118, subsequent_indent="  "))


def as_markdown_of_missed(late: Missed, found: dict[str, float], profile: Table | None) -> str:
    """Return what was missed, by how much, why, and where the time goes, for a page."""
    figures = [_part(part.what, part, found, part.verdict(found)) for part in late.promise.parts]
    told = "; ".join(f"{row.name.removeprefix(': ')}, found {number(row.figures[1])} ({row.note})" for row in figures)
    lines = [f"### Missed: {late.promise.what}", "", f"{told}.", "", late.why, ""]
    return "\n".join([*lines, *([as_markdown(profile).replace("### ", "#### ")] if profile else [])])


def results_page(machine: Sequence[tuple[str, str]], sections: Sequence[Section], chart: str) -> str:
    """Return RESULTS.md.

    Args:
        machine: what it ran on, as names and values.
        sections: of all suites, in the order in which they ran.
        chart: the address of the chart.
    """
    found = {name: figure for section in sections for name, figure in section.found.items()}
    parts = ["# Results", "", f"Written by `./dev bench`. {_CAPTION}", "", f"![What one call costs]({chart})", ""]
    parts += ["## Budgets", "", as_markdown(budget_table(found)).partition("\n\n")[2]]
    profiles = {table.title: table for section in sections for table in section.tables}
    for late in missed(found):
        parts += [as_markdown_of_missed(late, found, profiles.get(late.profile)), ""]
    parts += ["## Machine", "", _cells(["", ""]), _cells(["---", "---"]), *map(_cells, machine), ""]
    shown = {late.profile for late in missed(found)}
    for section in sections:
        tables = [as_markdown(table) for table in section.tables if table.title not in shown]
        parts += [f"## {section.title}", "", *tables] if tables else []
    return "\n".join(parts).rstrip() + "\n"
