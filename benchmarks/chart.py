"""The chart of the README as SVG: a panel of bars for each comparison. Plain, and readable on light and dark pages."""

from collections.abc import Sequence
from xml.sax.saxutils import escape

from benchmarks.report import Bar, Panel, number

_WIDTH, _NAMES, _FIGURES = 760, 280, 96
_LINE, _BAR, _HEAD, _GAP, _MARGIN = 22, 14, 50, 14, 20

# The page's own colours may be unknown to an image, so it brings a ground along.
_STYLE = """
  text { font: 13px -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #1f2328 }
  .title { font-weight: 600 } .unit, .foot { fill: #59636e; font-size: 12px } .figure { font-size: 12px }
  .ground { fill: #ffffff; stroke: #d1d9e0 } .ours { fill: #0969da } .bare { fill: #afb8c1 } .peer { fill: #818b98 }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc } .unit, .foot { fill: #9198a1 }
    .ground { fill: #0d1117; stroke: #3d444d } .ours { fill: #4493f8 } .bare { fill: #3d444d } .peer { fill: #656c76 }
  }
"""


def draw(panels: Sequence[Panel], foot: str) -> str:
    """Return the chart.

    Args:
        panels: from top to bottom; each has a scale of its own, from zero.
        foot: one line below all: where the figures are from.
    """
    parts: list[str] = []
    top = _MARGIN
    for panel in panels:
        parts += _panel(panel, top)
        top += _HEAD + _LINE * len(panel.bars) + _GAP
    height = top + _MARGIN
    title = "CPU time of one operation: this library beside others, less is better"
    size = f'viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{title}">',
            f"<title>{title}</title>",
            f"<style>{_STYLE}</style>",
            f'<rect class="ground" x="0.5" y="0.5" width="{_WIDTH - 1}" height="{height - 1}" rx="8"/>',
            *parts,
            f'<text class="foot" x="{_MARGIN}" y="{height - _MARGIN + 4}">{escape(foot)}</text>',
            "</svg>",
            "",
        ]
    )


def _panel(panel: Panel, top: int) -> list[str]:
    longest = max((bar.length for bar in panel.bars), default=0.0) or 1.0
    parts = [
        f'<text class="title" x="{_MARGIN}" y="{top + 14}">{escape(panel.title)}</text>',
        f'<text class="unit" x="{_MARGIN}" y="{top + 32}">{escape(panel.unit)}</text>',
    ]
    for place, bar in enumerate(panel.bars):
        parts += _bar(bar, top + _HEAD + place * _LINE, bar.length / longest)
    return parts


def _bar(bar: Bar, top: int, share: float) -> list[str]:
    left, room = _MARGIN + _NAMES, _WIDTH - 2 * _MARGIN - _NAMES - _FIGURES
    width = max(1.0, room * max(0.0, share))
    name = f'<text x="{left - 8}" y="{top + 11}" text-anchor="end">{escape(bar.name)}</text>'
    box = f'<rect class="{bar.whose}" x="{left}" y="{top}" width="{width:.1f}" height="{_BAR}" rx="2"/>'
    return [name, box, f'<text class="figure" x="{left + width + 6:.1f}" y="{top + 11}">{number(bar.length)}</text>']
