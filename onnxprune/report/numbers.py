"""Numbers for people."""

from __future__ import annotations

_STEPS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def figures(value: float, digits: int = 3) -> str:
    """``value`` with so many significant digits, never in scientific notation unless tiny."""
    if value == 0:
        return "0"
    if abs(value) < 1e-4:
        return f"{value:.1e}"
    text = f"{value:#.{digits}g}"
    return f"{value:,.0f}" if "e" in text or abs(value) >= 10**digits else text.rstrip(".")


def milliseconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{figures(value / 1000)} s" if value >= 1000 else f"{figures(value)} ms"


def count(value: float | None) -> str:
    """``62.9 M``; below ten thousand the number itself."""
    if value is None:
        return "-"
    if abs(value) < 1e4:
        return f"{value:,.0f}"
    scale, letter = next(step for step in _STEPS if abs(value) >= step[0])
    return f"{figures(value / scale)} {letter}"


def size(value: float | None) -> str:
    """Bytes in decimal units."""
    return "-" if value is None else f"{count(value)}B" if value >= 1e4 else f"{value:,.0f} B"


def percent(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{100 * value:.{digits}f}%"


def points(value: float, digits: int = 2) -> str:
    """A difference of two shares, signed, in percentage points."""
    rounded = round(100 * value, digits) + 0.0
    return f"{rounded:+.{digits}f} pp" if rounded else f"{0:.{digits}f} pp"


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def cost(value: float | None, unit: str) -> str:
    """A value of a cost table: ``ms``, ``macs``, ``params`` or ``bytes``."""
    if unit == "ms":
        return milliseconds(value)
    return size(value) if unit == "bytes" else f"{count(value)} {'MACs' if unit == 'macs' else 'parameters'}" if value is not None else "-"


def seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 60 else f"{int(value // 60)} min {value % 60:02.0f} s"
