"""Render docs/idempotency-machine.md from the table in ``resilience.decisions``. Run it with ``./dev docs``."""

import sys

from resilience.decisions.idempotency_table import LAPSES, ROWS, Row

SHOWN = {
    "absent": "nobody asked, or it is forgotten",
    "in_progress": "an owner runs it, and renews its lease",
    "abandoned": "the lease is out",
    "completed": "the reply is kept",
    "expired": "a tombstone: it ran, the reply is gone",
    "released": "who took over gave it back; the epoch is kept",
}


def main() -> None:
    """Write the page to standard output."""
    write = sys.stdout.write
    write(
        "# The machine of an idempotency record\n\n"
        "Rendered from `resilience/decisions/idempotency_table.py` by `./dev docs`. The memory store reads its\n"
        "answers in this table; tests hold the Redis store to it, over random histories with crashes, clock jumps and\n"
        "repeated commands.\n\n"
        "```mermaid\nstateDiagram-v2\n    [*] --> absent\n"
    )
    write("".join(f"    {state}: {state} ({meaning})\n" for state, meaning in SHOWN.items()))
    write("".join(f"    {before} --> {then}: {', '.join(names)}\n" for (before, then), names in _arrows().items()))
    write(
        "```\n\n## Commands\n\n`resolve` and `forget` are an operator's. What is not in the picture writes nothing.\n\n"
    )
    write("| row | command | state | asked by | answer | then | why |\n|---|---|---|---|---|---|---|\n")
    write("".join(_line(row) for row in ROWS))
    write("\n## What time alone does\n\n| row | state | then | why |\n|---|---|---|---|\n")
    write("".join(f"| {lapse.name} | {lapse.state} | {lapse.then} | {lapse.why} |\n" for lapse in LAPSES))


def _arrows() -> dict[tuple[str, str], list[str]]:
    arrows: dict[tuple[str, str], list[str]] = {}
    for row in ROWS:
        for state in row.states:
            if row.then is not None and row.then != state:
                arrows.setdefault((state, row.then), []).append(row.name)
    for lapse in LAPSES:
        arrows.setdefault((lapse.state, lapse.then), []).append(lapse.name)
    return arrows


def _line(row: Row) -> str:
    asked = [] if row.by == "any" else [{"owner": "the owner", "other": "another"}[row.by]]
    asked += [] if row.payload == "any" else [f"{row.payload} payload"]
    asked += [] if row.takeover == "any" else [f"policy `{row.takeover}`"]
    asked += [] if row.turn == "any" else [{"first": "epoch 1", "later": "epoch above 1"}[row.turn]]
    then: str = row.then or "as it was"
    if row.then == "in_progress" or row.epoch != "kept":
        then += {"first": ", epoch 1", "raised": ", epoch + 1", "kept": ""}[row.epoch]
    cells = (row.name, row.command, ", ".join(row.states), ", ".join(asked) or "anyone", row.answer, then, row.why)
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    main()
