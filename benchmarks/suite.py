"""Runs one suite in a process of its own and writes what it found to a file. Started by ``benchmarks``, not by people.

Own process: no suite walks another's garbage, warms its caches or holds its modules.
"""

import asyncio
import sys
from importlib import import_module
from pathlib import Path

from benchmarks.report import Section, to_json


def main(name: str, target: Path, *, quick: bool) -> None:
    """Run the suite's ``run``, which tells how it goes on standard error."""
    section: Section = asyncio.run(import_module(f"benchmarks.{name}").run(quick=quick))
    target.write_text(to_json(section))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), quick="--quick" in sys.argv)
