"""What a run record says: the verdict, where the speed comes from, what it cost. Shared by the tables and the HTML report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from onnxprune.report.numbers import cost, figures, milliseconds, percent, points, size, times

_WORDS = {"macs": "multiply-adds", "params": "parameters", "size": "file size"}
Record = Mapping[str, Any]
GIVEN, FINISHED, PRUNED, COPY, WORDS = "file as given", "finished original", "pruned", "finished copy", "fewer words"
_PLUS = " + "
_NAMED = 6
"""Groups in float beyond this many are counted."""


@dataclass(frozen=True)
class Verdict:
    """``tone``: good, warn (done, but look), bad (a gate failed), plain (nothing was applied)."""

    tone: Literal["good", "warn", "bad", "plain"]
    title: str
    detail: str


@dataclass(frozen=True)
class Speed:
    """Speed-ups (a/b of latencies). ``parts`` are factors of ``total`` by what brought them, each measured on top of those before."""

    total: float
    low: float
    high: float
    parts: Mapping[str, float]

    @property
    def certain(self) -> bool:
        """The whole interval lies on one side of no change."""
        return self.low > 1 or self.high < 1


def shipped(record: Record) -> str | None:
    """What the benchmark calls the model that was written, such as ``pruned`` or ``pruned + int8``; None without a benchmark."""
    variants = (record.get("benchmark") or {}).get("variants", {})
    names = [name for name in variants if name not in (GIVEN, FINISHED)]
    return names[-1] if names and FINISHED in variants else None


def speed(record: Record) -> Speed | None:
    """None without a benchmark."""
    last = shipped(record)
    if last is None:
        return None
    gains = {name: variant["speedup"] for name, variant in record["benchmark"]["variants"].items()}
    parts = {"finishing the graph": gains[FINISHED]["median"]}
    so_far = parts["finishing the graph"]
    if last.startswith(PRUNED):
        reached = gains[PRUNED]["median"]
        parts["pruning"] = reached / so_far
        so_far = reached
    numbers = "" if last in (COPY, WORDS) else last.removeprefix(PRUNED).removeprefix(_PLUS)
    if numbers:
        parts[numbers] = gains[last]["median"] / so_far
    return Speed(gains[last]["median"], gains[last]["low"], gains[last]["high"], parts)


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
    if target["already_met"] and not ((record.get("vocabulary") or {}).get("tables") or record.get("hidden") or record.get("layers")):
        return Verdict("plain", "Already met", _met(record))
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
    if (gained := speed(record)) is not None and gained.high < 1:
        advice = "" if target["unit"] == "ms" else " What was counted is no time: --target-latency measures it."
        return Verdict("warn", "Slower", f"The model runs at {times(gained.total)} of the speed of the file as given.{advice}")
    limit = "; ".join(
        f"{gate['name']} {percent(gate['value'], 2)}, at most {percent(gate['limit'], 2)} allowed" for gate in record.get("gates", ())
    )
    reached = asked(record) if target["goal"] is None else f"target {asked(record)} met"
    return Verdict("good", "Done", f"{reached[:1].upper()}{reached[1:]}; {limit or 'no --max-drop was set'}.")


def _met(record: Record) -> str:
    """Who meets the target: the file as given, or only its finished copy, which is then worth writing."""
    target = record["target"]
    if target["given"] <= target["goal"]:
        return f"The file as given meets the target, {asked(record)}."
    finished, given = (cost(target[name], target["unit"]) for name in ("finished", "given"))
    copy = "the finished copy was written" if record.get("output") else "--write-unpruned writes the finished copy"
    return f"Finishing alone meets the target, {asked(record)}: {finished} instead of {given} as given; {copy}."


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
            f"was {percent(before)}: {points(-drop['value'])} [{points(-drop['high'])}, {points(-drop['low'])}], {rows}",
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
    change = f"{milliseconds(variants[GIVEN]['latency_ms'])} to {milliseconds(variants[shipped(record)]['latency_ms'])}"
    if not gained.certain:
        return f"no measurable change of latency ({change}), {words}"
    return f"{times(gained.total)} as fast ({change}), {words}"


def split(record: Record) -> str:
    """Where the speed-up comes from; empty without a benchmark."""
    gained = speed(record)
    return ", ".join(f"{times(factor)} from {what}" for what, factor in gained.parts.items()) if gained else ""


# --- int8 --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Integers:
    """``count`` of ``total`` products, ``share`` of their multiply-adds, compute in int8 by ``scheme``; ``floats`` are the other groups."""

    scheme: str
    count: int
    total: int
    share: float
    floats: tuple[str, ...]


def integers(record: Record) -> Integers | None:
    """None if nothing computes in int8."""
    known = record.get("int8") or {}
    if known.get("scheme") is None:
        return None
    in_float = [group for group in known["groups"] if _in_float(group, known)]
    names = {name for group in known["groups"] for name in group["products"]}
    whole = sum(group["macs"] for group in known["groups"])
    share = 1 - sum(group["macs"] for group in in_float) / whole if whole else 0.0
    return Integers(known["scheme"], len(names - set(known["float"])), len(names), share, tuple(group_name(group) for group in in_float))


def _in_float(group: Record, known: Record) -> bool:
    return group["products"][0] in known["float"]


def group_name(group: Record) -> str:
    """The site, if the group is in one, its first product, and how many more there are."""
    first, *others = group["products"]
    name = f"{first} (+{len(others)})" if others else str(first)
    return f"{group['site']}: {name}" if group["site"] else name


def group_state(group: Record, known: Record) -> str:
    """What became of a group of products: "int8", "int8, smoothed" or "float"."""
    if known["scheme"] is None or _in_float(group, known):
        return "float"
    return "int8, smoothed" if group["smoothed"] else "int8"


_DIRECTIONS = (("qk", "directions of queries and keys"), ("vo", "directions of values"))


_BY = {"nothing": "nothing", "constant": "a constant", "thin map": "two thin matrices", "map": "a matrix"}


def kept(record: Record) -> str:
    """What stays: units by kind, and products by numbers; empty if neither was decided."""
    words = []
    for kind, unit in (("heads", "heads"), ("ffn", "neurons"), ("channels", "channels"), *_DIRECTIONS):
        sites = [site for site in record["sites"] if site["kind"] == kind]
        if sites:
            stay, units = sum(site["kept"] for site in sites), sum(site["units"] for site in sites)
            words.append(f"{f'{stay:,} of' if stay < units else 'all'} {units:,} {unit} kept")
    if caches := record.get("caches"):
        fewer = ", ".join(f"{cache['input']} {cache['kept']} of {cache['units']}" for cache in caches[:_NAMED])
        words.append(f"caches hold fewer heads: {fewer}{f' and {len(caches) - _NAMED} more' if len(caches) > _NAMED else ''}")
    words += [f"{item['after']:,} of {item['before']:,} directions of the residual stream kept" for item in record.get("hidden", ())]
    if replaced := record.get("layers"):
        told = ", ".join(f"{item['sublayer']} by {_BY[item['by']]}" for item in replaced[:_NAMED])
        more = f" and {len(replaced) - _NAMED} more" if len(replaced) > _NAMED else ""
        words.append(f"{len(replaced)} sublayer{'s' if len(replaced) > 1 else ''} replaced: {told}{more}")
    for table in (record.get("vocabulary") or {}).get("tables", ()):
        lost = "" if table["unseen"] is None else f", {percent(table['unseen'])} of the tokens of new text will read a stand-in"
        words.append(f"{table['kept']:,} of {table['rows']:,} word rows kept ({size(table['saved_bytes'])} less{lost})")
    if chosen := (record.get("tokens") or {}).get("chosen"):
        behind = ", ".join(f"{percent(cut['share'])} behind attention {cut['block']}" for cut in chosen["cuts"])
        ranked = " by predictor" if chosen.get("score") == "predictor" else ""
        words.append(f"tokens that stay ({chosen['policy']}{ranked}): {behind or 'all'}")
    if polished := record.get("polish"):
        fewer = f"divergence {polished['before']:.2g} to {polished['after']:.2g} on rows that it did not learn from"
        words.append(f"polished: {fewer}" if polished["epoch"] else "polish did not help and was left out")
    if (found := integers(record)) is not None:
        which = f"{found.count:,} of" if found.count < found.total else "all"
        words.append(f"{which} {found.total:,} products compute in int8 ({found.scheme})")
        if found.floats:
            more = f" and {len(found.floats) - _NAMED} more" if len(found.floats) > _NAMED else ""
            words.append(f"in float: {', '.join(found.floats[:_NAMED])}{more}")
    elif (record.get("int8") or {}).get("trials"):
        words.append("nothing computes in int8")
    return "; ".join(words)


def divergence(record: Record) -> str:
    """What the errors of int8 are measured in."""
    return "KL divergence in nats" if record["objective"]["link"] != "identity" else "1 - cosine"


# --- quality of several models -----------------------------------------------------------------------------------------------------


def measures(chain: Mapping[str, Record]) -> list[tuple[str, str]]:
    """Columns of quality: (heading, key of a comparison); empty if nothing was compared."""
    first = next(iter(chain.values()), None)
    if first is None:
        return []
    if first["cosine"] is not None:
        return [("cosine", "cosine"), ("rel. error", "relative_error")]
    told = ("accuracy", "accuracy_after") if first["drop"] is not None else ("agreement", "agreement")
    return [told, ("KL", "kl")]


def measured_as(chain: Mapping[str, Record], variants: Sequence[str], name: str, key: str) -> str:
    """One cell of those columns; the first variant is what the others are compared with."""
    if name in chain:
        value = chain[name][key]["value"]
        return f"{value:.4f}" if key == "cosine" else _nats(value) if key == "kl" else percent(value)
    if name != variants[0]:
        return "same" if name == FINISHED else "-"
    return percent(next(iter(chain.values()))["accuracy_before"]["value"]) if key == "accuracy_after" else "-"


def _nats(value: float) -> str:
    """Divergences of a table side by side: powers of ten tell them apart."""
    return f"{value:.1e}" if 0 < abs(value) < 0.01 else figures(value, 2)
