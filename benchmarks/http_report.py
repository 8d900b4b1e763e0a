"""What ``benchmarks.http`` measures, for a report."""

from benchmarks.http import ALL, ALONE, BARE, CONTEXT, KEYS, LIMIT, Found, Table, added, collect, cost, faster, share
from benchmarks.reasons import PEERS
from benchmarks.report import Bar, Panel, Row, Section, Whose
from benchmarks.report import Table as Reported
from benchmarks.rounds import Figure
from benchmarks.yardsticks import UNCHECKED_IDS, WRAPPED_SEND


def reported(title: str, table: Table) -> Reported:
    """Return a table as ``report`` shows it; its first row is the base of the others."""
    base = next(figure for figure in table.values() if isinstance(figure, Figure))
    rows = []
    for name, row in table.items():
        if isinstance(row, str):
            rows.append(Row(name, note=row))
            continue
        figures = (row.cpu, row.cpu - base.cpu, row.cpu / base.cpu, 1e6 / row.wall, base.wall / row.wall)
        rows.append(Row(name, figures, f"{row.refused} ANSWERS OTHER THAN 200" if row.refused else ""))
    return Reported(title, ("CPU µs", "added", "x bare", "a second", "x bare's"), tuple(rows))


def panel(title: str, table: Table, rows: tuple[str, ...]) -> Panel:
    """Return the bare route, some rows of ours and all peers as bars."""
    bars = []
    for place, (name, figure) in enumerate(table.items()):
        if isinstance(figure, Figure) and (not name.startswith("+") or name in rows):
            whose: Whose = "bare" if not place else "ours" if name in rows else "peer"
            bars.append(Bar(f"ours, {name[2:]}" if whose == "ours" else name, figure.cpu, whose))
    return Panel(title, "µs of CPU for each request, the route's own included", tuple(bars))


def _findings(found: Found) -> dict[str, float]:
    held = {
        "http.all": added(found.plain, f"+ {ALL}"),
        "http.context": added(found.plain, f"+ {CONTEXT}"),
        "http.unkeyed": added(found.plain, f"+ {KEYS}", f"+ {LIMIT}"),
        "http.share": share(found.route),
        # What the budgets that are missed are explained with.
        "raw.wrapped": added(found.plain, WRAPPED_SEND),
        "raw.ids": added(found.plain, UNCHECKED_IDS),
        "route.wrapped": added(found.route, WRAPPED_SEND),
        "route.ids": added(found.route, UNCHECKED_IDS),
        "route.context": added(found.route, f"+ {CONTEXT}"),
        "route.all": added(found.route, f"+ {ALL}"),
        "route.bare": cost(found.route),
        "crowd.bare": cost(found.crowd),
        "crowd.limit": added(found.crowd, f"+ {ALONE}"),
    }
    for peer in PEERS:
        held[f"http.{peer}"] = faster(found.crowd, f"+ {ALONE}", peer)
        held[f"free.{peer}"] = faster(found.crowd, BARE, peer)
    return {name: figure for name, figure in held.items() if figure is not None}


async def run(*, quick: bool) -> Section:
    """Measure, for a report."""
    found = await collect(quick=quick)
    tables = [reported("Over a raw ASGI application, in memory", found.plain)]
    tables += [reported("Over a FastAPI route, in memory", found.route)]
    tables += [reported(f"Over a FastAPI route, Redis, {at} at once", table) for at, table in found.redis.items()]
    title = "A limited POST to a FastAPI route, counts in Redis, headers on, 64 at once"
    panels = (panel(title, found.crowd, (f"+ {ALONE}",)),) if found.crowd else ()
    return Section("HTTP", tuple(tables), _findings(found), panels)
