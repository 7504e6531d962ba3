"""Geometry of the report's drawings: plain numbers in, coordinates out. The template only places them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnxprune.report.numbers import figures, milliseconds, percent, times
from onnxprune.report.story import FINISHED, GIVEN, group_name, group_state

Record = Mapping[str, Any]
_WIDTH = 560.0
"""Drawing width in SVG units of everything that has a scale."""
_GROUPS = 32


def latency_bars(benchmark: Record) -> list[dict[str, Any]]:
    """One bar a variant. The whisker is the relative interval of its paired speed-up, put around the end of the bar."""
    variants = benchmark["variants"]
    longest = max(variant["latency_ms"] * variant["speedup"]["median"] / variant["speedup"]["low"] for variant in variants.values())
    bars: list[dict[str, Any]] = []
    for name, variant in variants.items():
        gain = variant["speedup"]
        width = _WIDTH * variant["latency_ms"] / longest
        bars.append(
            {
                "name": name,
                "tone": _tone(name, variants),
                "width": width,
                "low": width * gain["median"] / gain["high"],
                "high": width * gain["median"] / gain["low"],
                "label": milliseconds(variant["latency_ms"]),
                "note": "reference" if not bars else f"{times(gain['median'])}  [{gain['low']:.2f}, {gain['high']:.2f}]",
            }
        )
    return bars


def _tone(name: str, variants: Record) -> str:
    """Drawing class: the reference, what was shipped, and what lies between them."""
    return "given" if name == GIVEN else "full" if name == list(variants)[-1] and name != FINISHED else "half"


def latency_boxes(benchmark: Record) -> dict[str, Any]:
    """Quantile boxes of all variants on one axis: whiskers 10 to 90 %, box 25 to 75 %, a line at the median, a dot at the fastest run."""
    rows = {name: variant["quantiles_ms"] for name, variant in benchmark["variants"].items()}
    values = [value for row in rows.values() for value in row.values()]
    low, high = min(values), max(values)
    margin = (high - low) * 0.05 or high * 0.05 or 1.0
    start = max(low - margin, 0.0)
    span = high + margin - start

    def x(value: float) -> float:
        return float(_WIDTH * (value - start) / span)

    boxes = [
        {
            "name": name,
            "tone": _tone(name, rows),
            **{word: x(row[key]) for word, key in _QUANTILES.items()},
            "median_label": milliseconds(row["0.5"]),
        }
        for name, row in rows.items()
    ]
    return {"boxes": boxes, "ticks": [{"x": x(value), "label": figures(value)} for value in _ticks(start, start + span)]}


_QUANTILES = {"fastest": "0.0", "p10": "0.1", "p25": "0.25", "median": "0.5", "p75": "0.75", "p90": "0.9"}


def _ticks(low: float, high: float) -> list[float]:
    """About five round values inside a range."""
    rough = (high - low) / 5
    power = 10.0 ** int(f"{rough:e}".partition("e")[2])
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first = int(low / step) + 1
    return [index * step for index in range(first, first + 20) if index * step < high]


def layers(record: Record) -> list[dict[str, Any]]:
    """One row a layer: heads as boxes in their order (known only with the plan), other units as a bar."""
    chosen: Mapping[str, Sequence[int]] = record.get("plan_kept", {})
    widest = {kind: max(site["units"] for site in record["sites"] if site["kind"] == kind) for kind in {s["kind"] for s in record["sites"]}}
    rows: dict[str, dict[str, Any]] = {}
    for site in record["sites"]:
        name = site["site"].rpartition(".")[0] or site["site"]
        kept = set(chosen.get(site["site"], range(site["kept"])))
        entry = {
            "kept": site["kept"],
            "units": site["units"],
            "share": percent(site["kept"] / site["units"], 0),
            "scale": site["units"] / widest[site["kind"]],
            "part": site["kept"] / site["units"],
            "boxes": [unit in kept for unit in range(site["units"])] if site["kind"] == "heads" and site["units"] <= 64 else None,
        }
        rows.setdefault(name, {"name": name.replace(".", " "), "sites": {}})["sites"][site["kind"]] = entry
    return list(rows.values())


def sensitivity(known: Record) -> dict[str, Any]:
    """One bar a group of products, the longest error first; beyond a page, the others as one number."""
    groups = sorted(known["groups"], key=lambda group: -group["error"])
    most = groups[0]["error"] if groups else 0.0
    work = sum(group["macs"] for group in groups) or 1.0
    rows = [
        {
            "name": group_name(group),
            "part": max(group["error"], 0.0) / most if most > 0 else 0.0,
            "error": figures(group["error"]),
            "share": percent(group["macs"] / work),
            "state": group_state(group, known),
        }
        for group in groups[:_GROUPS]
    ]
    rest = groups[_GROUPS:]
    return {"rows": rows, "more": len(rest), "in_float": sum(group_state(group, known) == "float" for group in rest)}


def intervals(chain: Mapping[str, Record]) -> dict[str, Any] | None:
    """Accuracy of the original and of every step on one axis; without labels, agreement or cosine of the steps."""
    steps = list(chain.items())
    if not steps:
        return None
    first = steps[0][1]
    key = "accuracy_after" if first["accuracy_before"] is not None else "agreement" if first["agreement"] is not None else "cosine"
    found = [("original", first["accuracy_before"])] if key == "accuracy_after" else []
    found += [(name, step[key]) for name, step in steps if step[key] is not None]
    if not found:
        return None
    low = min(interval["low"] for _, interval in found)
    high = max(interval["high"] for _, interval in found)
    margin = max((high - low) * 0.3, 0.01)
    start, end = max(low - margin, 0.0), min(high + margin, 1.0)

    def x(value: float) -> float:
        return float(_WIDTH * (value - start) / (end - start))

    rows = [
        {
            "name": label,
            "tone": "given" if label == "original" else "full" if label == steps[-1][0] else "half",
            "value": x(i["value"]),
            "low": x(i["low"]),
            "high": x(i["high"]),
            "label": percent(i["value"]),
            "range": f"[{percent(i['low'])}, {percent(i['high'])}]",
        }
        for label, i in found
    ]
    return {"rows": rows, "ticks": [{"x": x(value), "label": f"{100 * value:.4g}%"} for value in _ticks(start, end)]}
