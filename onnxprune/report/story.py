"""What a run record says: the verdict, where the speed comes from, what it cost. Shared by the tables and the HTML report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from onnxprune.report.numbers import cost, milliseconds, percent, points, times

_WORDS = {"macs": "multiply-adds", "params": "parameters", "size": "file size"}
Record = Mapping[str, Any]
GIVEN, FINISHED, PRUNED = "file as given", "finished original", "pruned"


@dataclass(frozen=True)
class Verdict:
    """``tone``: good, warn (done, but look), bad (a gate failed), plain (nothing was applied)."""

    tone: Literal["good", "warn", "bad", "plain"]
    title: str
    detail: str


@dataclass(frozen=True)
class Speed:
    """Speed-ups (a/b of latencies); ``pruning`` is what remains of ``total`` after what ``finishing`` alone brings."""

    total: float
    low: float
    high: float
    finishing: float
    pruning: float

    @property
    def certain(self) -> bool:
        """The whole interval lies on one side of no change."""
        return self.low > 1 or self.high < 1


def speed(record: Record) -> Speed | None:
    """None without a benchmark."""
    variants = (record.get("benchmark") or {}).get("variants", {})
    if PRUNED not in variants or FINISHED not in variants:
        return None
    total, finishing = variants[PRUNED]["speedup"], variants[FINISHED]["speedup"]["median"]
    return Speed(total["median"], total["low"], total["high"], finishing, total["median"] / finishing)


def failed_gates(record: Record) -> list[Mapping[str, Any]]:
    return [gate for gate in record.get("gates", ()) if not gate["passed"]]


def target_missed(record: Record) -> bool:
    """The search's own measurement is over the goal by more than the tolerance."""
    target = record["target"]
    return target["goal"] is not None and target["measured"] > target["goal"] * (1 + target["tolerance"])


def contradicted(record: Record) -> float | None:
    """Milliseconds of the final benchmark, if its whole interval lies over the goal: the clock of the search was too kind."""
    target, measured = record["target"], speed(record)
    if target["unit"] != "ms" or target["goal"] is None or measured is None:
        return None
    if target["given"] / measured.high <= target["goal"] * (1 + target["tolerance"]):
        return None
    return float(target["given"] / measured.total)


def verdict(record: Record) -> Verdict:
    target = record["target"]
    fidelity = record.get("verification", {}).get("masked_equals_sliced")
    if fidelity and not fidelity["passed"]:
        return Verdict("bad", "Verification failed", "The sliced model does not equal the masked one.")
    if failed := failed_gates(record):
        gate = failed[0]
        state = "written because of --keep-best" if record.get("output") else "not written"
        return Verdict(
            "bad",
            "Gate failed",
            f"{gate['name']} is {percent(gate['value'], 2)}, more than {percent(gate['limit'], 2)}; the model was {state}.",
        )
    if target["already_met"]:
        return Verdict("plain", "Already met", f"The file meets {target['asked']} without pruning.")
    if "verification" not in record:
        return Verdict("plain", "Plan only", f"Predicted {cost(target['predicted'], target['unit'])}; nothing was applied.")
    if target_missed(record):
        return Verdict(
            "warn", "Target missed", f"{cost(target['measured'], target['unit'])} instead of {cost(target['goal'], target['unit'])}."
        )
    if (found := contradicted(record)) is not None:
        return Verdict(
            "warn",
            "Target missed in the benchmark",
            f"{milliseconds(found)} instead of {milliseconds(target['goal'])}; the search measured {milliseconds(target['measured'])}. "
            "Run again on a quieter machine.",
        )
    limit = "; ".join(
        f"{gate['name']} {percent(gate['value'], 2)}, at most {percent(gate['limit'], 2)} allowed" for gate in record.get("gates", ())
    )
    return Verdict("good", "Done", f"Target {asked(record)} met; {limit or 'no --max-drop was set'}.")


def asked(record: Record) -> str:
    """The target in words: ``60% of the latency (1.20 ms)``."""
    target = record["target"]
    quantity, _, value = target["asked"].partition("=")
    quantity = _WORDS.get(quantity, quantity)
    if value == "auto":
        return f"{quantity} as low as the loss allows"
    goal = cost(target["goal"], target["unit"])
    return f"{value} of the {quantity} ({goal})" if value.endswith("%") else f"{quantity} {goal}"


def quality(comparison: Record | None) -> tuple[str, str, str]:
    """(what, value, detail) of the most telling comparison with the original."""
    if comparison is None:
        return "quality", "-", "not measured"
    rows = f"{comparison['samples']:,} held-back samples"
    if (drop := comparison.get("drop")) is not None:
        after, before = comparison["accuracy_after"]["value"], comparison["accuracy_before"]["value"]
        return (
            "accuracy",
            percent(after),
            f"was {percent(before)}: {points(-drop['value'])} [{-100 * drop['high']:+.2f}, {-100 * drop['low']:+.2f}], {rows}",
        )
    if (agreement := comparison.get("agreement")) is not None:
        return (
            "agreement",
            percent(agreement["value"]),
            f"same prediction [{percent(agreement['low'])}, {percent(agreement['high'])}], {rows}",
        )
    cosine = comparison["cosine"]
    return "cosine", f"{cosine['value']:.4f}", f"to the original output [{cosine['low']:.4f}, {cosine['high']:.4f}], {rows}"


def headline(record: Record) -> str:
    """How much faster, and at what quality; empty if nothing was applied."""
    gained = speed(record)
    comparison = record.get("verification", {}).get("against_original")
    what, value, _ = quality(comparison)
    words = f"{what} {value}" if comparison else ""
    if gained is None:
        return words
    variants = record["benchmark"]["variants"]
    change = f"{milliseconds(variants[GIVEN]['latency_ms'])} to {milliseconds(variants[PRUNED]['latency_ms'])}"
    if not gained.certain:
        return f"no measurable change of latency ({change}), {words}"
    return f"{times(gained.total)} as fast ({change}), {words}"


def split(record: Record) -> str:
    """Where the speed-up comes from; empty without a benchmark."""
    gained = speed(record)
    return f"{times(gained.finishing)} from finishing the graph, {times(gained.pruning)} from pruning" if gained else ""
