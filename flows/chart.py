"""One line chart as SVG text, for a markdown artifact: no library, no font and no address from outside."""

import math
from base64 import b64encode
from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT = 960, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 64, 40
_COLOURS = ("#2563eb", "#d97706", "#dc2626", "#059669", "#7c3aed", "#475569")  # apart also in grey and for most eyes
_DASHES = ("", "8 4", "2 3", "12 3 2 3", "5 5", "1 4")


class Line(NamedTuple):
    """`points`: (time, value), oldest first; None is a gap."""

    name: str
    points: Sequence[tuple[datetime, float | None]]


def svg(title: str, lines: Sequence[Line], *, unit: str = "", least: float | None = None) -> str:
    """Lines over one time axis. `least` is a value the scale reaches down to at least."""
    times = [at.timestamp() for line in lines for at, _ in line.points]
    values = [value for line in lines for _, value in line.points if value is not None]
    if not values:
        return _document(title, [_text(_WIDTH / 2, _HEIGHT / 2, "nothing was measured", "middle")])
    ticks = _ticks(min([*values, *([least] if least is not None else [])]), max(values))
    low, high = ticks[0], ticks[-1]
    first, last = min(times), max(max(times), min(times) + 1)

    def x(at: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (at - first) / (last - first)

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low)

    drawn = []
    for value in ticks:
        drawn.append(_rule(y(value), "#e2e8f0"))
        drawn.append(_text(_LEFT - 8, y(value) + 4, f"{value:g}{unit}", "end"))
    for n, anchor in enumerate(("start", "middle", "middle", "middle", "end")):
        at = first + (last - first) * n / 4
        style = "%m-%d" if last - first > 259_200 else "%m-%d %H:%M" if last - first > 600 else "%H:%M:%S"
        label = datetime.fromtimestamp(at, lines[0].points[0][0].tzinfo).strftime(style)
        drawn.append(_text(x(at), _HEIGHT - 14, label, anchor))
    if low < 0 < high:
        drawn.append(_rule(y(0), "#94a3b8"))
    for n, line in enumerate(lines):
        colour, dash = _COLOURS[n % len(_COLOURS)], _DASHES[n % len(_DASHES)]
        style = f'fill="none" stroke="{colour}" stroke-width="2"' + (f' stroke-dasharray="{dash}"' if dash else "")
        for stretch in _stretches(line.points):
            if len(stretch) == 1:
                ((at, value),) = stretch
                drawn.append(f'<circle cx="{x(at):.1f}" cy="{y(value):.1f}" r="3" fill="{colour}"/>')
            else:
                path = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in stretch)
                drawn.append(f'<polyline {style} points="{path}"/>')
        legend = _LEFT + n * (_WIDTH - _LEFT - _RIGHT) / max(4, len(lines))
        drawn.append(f'<line x1="{legend:.1f}" x2="{legend + 24:.1f}" y1="46" y2="46" {style}/>')
        drawn.append(_text(legend + 30, 50, line.name, "start"))
    return _document(title, drawn)


def markdown(document: str, title: str) -> str:
    """The picture inside a markdown text, as its own address: nobody has to serve it."""
    return f"![{title}](data:image/svg+xml;base64,{b64encode(document.encode()).decode()})"


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, the first not above `low` and the last not below `high`."""
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    magnitude = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(magnitude * n for n in (1, 2, 5, 10) if magnitude * n * 5 >= high - low)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(n * step, 9) for n in range(first, last + 1)]


def _stretches(points: Sequence[tuple[datetime, float | None]]) -> list[list[tuple[float, float]]]:
    """The points between gaps."""
    found: list[list[tuple[float, float]]] = [[]]
    for at, value in points:
        if value is not None:
            found[-1].append((at.timestamp(), value))
        elif found[-1]:
            found.append([])
    return [stretch for stretch in found if stretch]


def _rule(y: float, colour: str) -> str:
    return f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{escape(text)}</text>'


def _document(title: str, drawn: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}"'
        f' font-family="sans-serif" font-size="12" fill="#334155"><title>{escape(title)}</title>'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>'
        + _text(_LEFT, 26, title, "start", 'font-size="16" font-weight="bold"')
        + "".join(drawn)
        + "</svg>"
    )
