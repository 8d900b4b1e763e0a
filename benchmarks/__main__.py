"""Runs every suite, one after the other, and says which budgets are met: ``./dev bench``, or ``./dev bench --quick``.

Within a suite, all candidates are measured in turns. The whole run writes RESULTS.md beside this file, and the chart
of the README; a quick one, or one of some suites only, writes nothing.
"""

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from benchmarks.budgets import PROMISES
from benchmarks.chart import draw
from benchmarks.machine import describe
from benchmarks.progress import Progress
from benchmarks.reasons import missed
from benchmarks.report import Section, as_text, as_text_of_missed, budget_table, from_json, results_page, tally

HERE = Path(__file__).parent
RESULTS, CHART = HERE / "RESULTS.md", HERE.parent / "docs" / "benchmarks.svg"


class Suite(NamedTuple):
    """One suite: its module, and the seconds that it takes, whole and quick, on the machine of RESULTS.md."""

    module: str
    whole: float
    quick: float


SUITES = {
    "decisions": Suite("decisions", 6, 3),
    "policies": Suite("layers", 3, 2),
    "store": Suite("store", 80, 8),
    "http": Suite("http_report", 60, 26),
    "grpc": Suite("grpc", 70, 14),
    "idempotency": Suite("idempotency_report", 95, 14),
    "profiles": Suite("profiles", 35, 8),
    "scale": Suite("scale", 150, 20),
    "load": Suite("load", 175, 28),
}


async def run_suite(name: str, progress: Progress, *, quick: bool) -> Section | str:
    """Run a suite in a process of its own; return what it found, or why it found nothing."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "section.json")
        command = [
            sys.executable,
            "-m",
            "benchmarks.suite",
            SUITES[name].module,
            str(target),
            *(["--quick"] if quick else []),
        ]
        process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.PIPE, cwd=HERE.parent)
        try:
            said = await progress.follow(process)
        except BaseException:  # Ctrl-C as well: nothing runs on
            with suppress(ProcessLookupError):
                process.terminate()
            raise
        if await process.wait():
            return f"{name} ended with {process.returncode}: {said[-1] if said else 'without a word'}"
        return from_json(await asyncio.to_thread(target.read_text))


def _seconds(suite: Suite, *, quick: bool) -> float:
    return suite.quick if quick else suite.whole


async def run(names: Sequence[str], *, quick: bool) -> tuple[list[Section], list[str]]:
    """Run suites and show each as it ends; return what they found, and which failed."""
    sections: list[Section] = []
    failed: list[str] = []
    progress = Progress({name: _seconds(SUITES[name], quick=quick) for name in names}, sys.stderr)
    for name in names:
        progress.begin(name)
        found = await run_suite(name, progress, quick=quick)
        progress.end()
        if isinstance(found, str):
            failed.append(found)
            print(f"== {found}\n", flush=True)
            continue
        sections.append(found)
        print(f"== {found.title}\n", flush=True)
        for table in found.tables:
            print(as_text(table), flush=True)
    return sections, failed


def main() -> int:
    """Return the exit code: 0 when every suite ran, whatever the budgets say."""
    parser = argparse.ArgumentParser(prog="./dev bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds: under two minutes; writes nothing")
    parser.add_argument("--only", metavar="SUITE,...", help=f"some of: {', '.join(SUITES)}; writes nothing")
    arguments = parser.parse_args()
    names = arguments.only.split(",") if arguments.only else list(SUITES)
    unknown = set(names) - set(SUITES)
    if unknown:
        parser.error(f"no such suite: {', '.join(sorted(unknown))}")
    machine = describe()
    for name, text in machine:
        print(f"{name:18} {text}")
    print(flush=True)
    sections, failed = asyncio.run(run(names, quick=arguments.quick))
    found = {name: figure for section in sections for name, figure in section.found.items()}
    print(as_text(budget_table(found)))
    for late in missed(found):
        print(f"{as_text_of_missed(late)}\n")
    for why in failed:
        print(f"FAILED: {why}")
    if len(names) == len(SUITES) and not arguments.quick and not failed:
        RESULTS.write_text(results_page(machine, sections, "../docs/benchmarks.svg"))
        foot = f"./dev bench · {machine[0][1]} · {tally(PROMISES, found)} · benchmarks/RESULTS.md"
        CHART.write_text(draw([panel for section in sections for panel in section.panels], foot))
        print(f"Written: {RESULTS.relative_to(HERE.parent)}, {CHART.relative_to(HERE.parent)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
