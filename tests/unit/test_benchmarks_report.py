"""What ``./dev bench`` writes is right, held to figures that were made up; nothing here is timed."""

import io
from xml.etree import ElementTree as ET

import pytest

from benchmarks.budgets import PROMISES, Part
from benchmarks.chart import draw
from benchmarks.progress import Progress
from benchmarks.report import (
    Bar,
    Panel,
    Row,
    Section,
    Table,
    as_markdown,
    as_text,
    budget_table,
    from_json,
    number,
    results_page,
    to_json,
)

SVG = "{http://www.w3.org/2000/svg}"
PARTS = [part for promise in PROMISES for part in promise.parts]
AT_THE_BOUND = {part.key: part.bound for part in PARTS}
TABLE = Table(
    "One | request",
    ("CPU µs", "x bare"),
    (
        Row("bare", (10.0, 1.0)),
        Row("ours", (12.5, 1.25)),
        Row("slow|peer", note="not installed"),
        Row("odd", (1.0, None)),
    ),
    "A note.",
)
PANELS = (
    Panel(
        "One <request>", "µs & more", (Bar("bare", 10.0, "bare"), Bar("ours", 20.0, "ours"), Bar("peer", 40.0, "peer"))
    ),
    Panel("None", "µs", ()),
    Panel("Nothing", "µs", (Bar("ours", 0.0, "ours"),)),
)
SECTION = Section("HTTP", (TABLE,), {"http.all": 14.0}, PANELS)


def _past(part: Part) -> float:
    return part.bound * 1.01 if part.most else part.bound * 0.99


def test_the_ten_rows_of_the_design_are_held_and_no_figure_is_held_twice() -> None:
    assert len(PROMISES) == 10
    assert len(AT_THE_BOUND) == len(PARTS)


def test_a_figure_at_its_bound_meets_the_budget() -> None:
    assert budget_table(AT_THE_BOUND).note == "10 of 10 met, 0 missed"


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.key)
def test_a_figure_past_its_bound_misses_its_row_and_no_other(part: Part) -> None:
    table = budget_table({**AT_THE_BOUND, part.key: _past(part)})
    assert table.note == "9 of 10 met, 1 missed"
    missed = [row for row in table.rows if row.note == "MISSED"]
    assert _past(part) in [figure for row in missed for figure in row.figures]
    assert len(missed) == (1 if [part] in [list(promise.parts) for promise in PROMISES] else 2)


def test_what_was_not_measured_is_said_and_never_met() -> None:
    assert budget_table({}).note == "0 of 10 met, 0 missed, 10 not measured"
    most = {key: bound for key, bound in AT_THE_BOUND.items() if key != "trips.new"}
    assert budget_table(most).note == "9 of 10 met, 0 missed, 1 not measured"


def test_a_missed_part_outweighs_one_that_was_not_measured() -> None:
    found = {key: bound for key, bound in AT_THE_BOUND.items() if key != "http.slowapi"} | {"http.fastapi-limiter": 1.0}
    assert budget_table(found).note == "9 of 10 met, 1 missed"


@pytest.mark.parametrize(
    ("figure", "shown"),
    [
        (None, "-"),
        (0.0, "0.00"),
        (-0.456, "-0.46"),
        (9.994, "9.99"),
        (12.34, "12.3"),
        (123.4, "123"),
        (1e6, "1,000,000"),
    ],
)
def test_a_figure_is_shown_with_the_digits_that_count(figure: float | None, shown: str) -> None:
    assert number(figure) == shown


def test_a_section_survives_the_way_from_its_process() -> None:
    assert from_json(to_json(SECTION)) == SECTION


def test_a_table_on_a_page_has_as_many_cells_in_each_row() -> None:
    lines = [line for line in as_markdown(TABLE).splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in lines} == {4}
    assert "| slow\\|peer (not installed) | - | - |" in lines
    assert "| ours | 12.5 | 1.25 |" in lines


def test_a_table_on_a_terminal_names_every_row_and_why_one_is_empty() -> None:
    text = as_text(TABLE)
    for said in ("CPU µs", "bare", "12.5", "slow|peer", "not installed", "A note."):
        assert said in text


def test_the_page_tells_the_budgets_the_machine_and_every_table() -> None:
    page = results_page([("CPU", "a | b")], [SECTION], "../docs/benchmarks.svg")
    places = [page.index(said) for said in ("](../docs/benchmarks.svg)", "## Budgets", "## Machine", "## HTTP")]
    assert places == sorted(places)
    assert "0 of 10 met, 0 missed, 10 not measured" not in page
    assert "1 of 10 met, 0 missed, 9 not measured" in page
    assert "| CPU | a \\| b |" in page
    assert page.count("### ") == 1
    assert page.endswith("A note.\n")


def test_the_chart_is_well_formed_and_its_bars_are_to_scale() -> None:
    drawn = ET.fromstring(draw(PANELS, "made up & small"))  # noqa: S314 - our own
    texts = ["".join(text.itertext()) for text in drawn.iter(f"{SVG}text")]
    assert {"One <request>", "µs & more", "ours", "20.0", "made up & small"} <= set(texts)
    bars = [box for box in drawn.iter(f"{SVG}rect") if box.get("class") in ("bare", "ours", "peer")]
    widths = [float(box.get("width", "")) for box in bars]
    assert widths[:3] == pytest.approx([widths[2] / 4, widths[2] / 2, widths[2]], abs=0.1)
    assert widths[3] <= 1


def test_nothing_of_the_chart_lies_outside_it() -> None:
    drawn = ET.fromstring(draw(PANELS, "made up"))  # noqa: S314 - our own
    width, height = float(drawn.get("width", "")), float(drawn.get("height", ""))
    for box in drawn.iter(f"{SVG}rect"):
        assert float(box.get("x", "")) + float(box.get("width", "")) <= width
        assert float(box.get("y", "")) + float(box.get("height", "")) <= height
    assert all(float(text.get("y", "")) < height for text in drawn.iter(f"{SVG}text"))


def test_the_chart_needs_nothing_from_elsewhere_and_suits_dark_pages() -> None:
    drawn = draw(PANELS, "made up")
    assert "prefers-color-scheme: dark" in drawn
    assert not [word for word in ("href", "url(", "@import", "<script") if word in drawn]


def test_the_progress_line_counts_down_and_learns_from_a_slow_machine() -> None:
    progress = Progress({"one": 10.0, "two": 20.0}, io.StringIO())
    progress.begin("one")
    assert progress.line(4.0, "round 1 of 5") == "  1 of 2, one; 0:26 left; round 1 of 5"
    assert progress.left(60.0) == 20.0
    progress.end()
    progress._done["one"] = 20.0
    progress.begin("two")
    assert progress.left(10.0) == 30.0
