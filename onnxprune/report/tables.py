"""Terminal tables, from the same records that go into run.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from onnxprune.report import story
from onnxprune.report.numbers import count, figures, milliseconds, percent, seconds, size, times

if TYPE_CHECKING:
    from rich.console import RenderableType

    from onnxprune.passes.base import Pass
    from onnxprune.search.plan import Plan

Record = Mapping[str, Any]
_TONES = {"good": "bold green", "warn": "bold yellow", "bad": "bold red", "plain": "bold cyan"}
_BAR = 24
_ROWS = 40
"""Sites beyond this many are summed up."""
_LABEL = 36
"""Columns of a name beside what is said about it."""
_SENSITIVE = 5
"""So many groups of products are named; the report shows all."""


def run_tables(record: Record, run_dir: Path | None) -> list[RenderableType]:
    """Everything a run has to say: verdict, before and after, sites, refusals, gates, files."""
    parts: list[RenderableType] = [_verdict(record), _facts(record)]
    if measured := record.get("benchmark"):
        parts += [benchmark_table(measured, record.get("chain")), benchmark_note(measured)]
    if compared := record.get("verification", {}).get("against_original"):
        parts.append(quality_table(compared))
    if record["sites"] and not record["target"]["already_met"]:
        parts.append(sites_table(record["sites"]))
    if tried := (record.get("int8") or {}).get("trials"):
        parts += [_trials(record, tried), *_sensitive(record)]
    for skipped in record.get("skipped", []):
        parts.append(Text.assemble((f"{skipped['step'].capitalize()} was left out", _TONES["warn"]), f": {skipped['reason']}"))
    if record["refusals"]:
        parts.append(refusals_table(record["refusals"]))
    if record["gates"]:
        parts.append(_gates(record["gates"]))
    if files := _files(record, run_dir):
        parts.append(files)
    return parts


def _verdict(record: Record) -> Text:
    verdict = story.verdict(record)
    text = Text.assemble((verdict.title, _TONES[verdict.tone]), ("  " + verdict.detail, ""))
    if line := story.headline(record):
        text.append("\n" + "; ".join(filter(None, (line, story.split(record)))))
    if line := story.kept(record):
        text.append(f"\n{line[:1].upper()}{line[1:]}")
    return text


def _facts(record: Record) -> Table:
    """What was decided on what."""
    data, recipe = record["calibration"], record["recipe"]
    how = f"{recipe['importance']}, {recipe['compensation']}, {recipe['rounds']} round{'s' * (recipe['rounds'] != 1)}; "
    even = "equal layers; " if recipe.get("uniform") else ""
    beside = Path(str(record["input"]["path"])).with_suffix(".calib.npz")
    found = " (found beside the model)" if "--calib" not in " ".join(record["command"]) and data["origin"] == str(beside) else ""
    rows = [
        ("model", f"{record['input']['path']}, opset {record['input']['opset']}, {count(record['input']['parameters'])} parameters"),
        ("data", f"{data['origin']}{found}: {data['rows']:,} rows decided, {data['held_back']:,} held back"),
        ("preserved", f"{record['objective']['output']} ({record['objective']['why']})"),
        ("recipe", f"{', '.join(record['passes'])}; {how if record['sites'] else ''}{even}seed {record['seed']}"),
    ]
    if record.get("finishing"):
        rows.append(("finishing", ", ".join(_part(part) for part in record["finishing"])))
    return _pairs([*rows, ("took", seconds(record["wall_s"]))])


def _part(part: Record) -> str:
    """``residual-sum 1.12x``, or why it was left out."""
    if part["kept"]:
        return f"{part['name']} {times(part['speedup'])}"
    return f"{part['name']} left out ({part['why']})"


def _pairs(rows: Sequence[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def _table(title: str, *columns: str, left: int = 1) -> Table:
    """A plain table; the first ``left`` columns hold words, the others numbers."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        header_style="dim",
    )
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < left else "right", overflow="fold")
    return table


def benchmark_table(benchmark: Record, chain: Mapping[str, Record] | None = None) -> Table:
    """Variants side by side; the first is what the speed-ups refer to.

    Args:
        chain: variant -> comparison with the first one; by default what the variants hold under ``quality``.
    """
    variants = benchmark["variants"]
    if chain is None:
        chain = {name: result["quality"] for name, result in variants.items() if result.get("quality")}
    measures = story.measures(chain)
    last = [heading for heading, _ in measures] or ["memory"]  # a page is not wide enough for both
    columns = ["", "latency", "speed-up [95%]", "file", "params", "MACs", *last]
    table = _table("Before and after" if story.FINISHED in variants else "Benchmark", *columns)
    for column in table.columns[1:]:
        column.no_wrap = True
    for name, result in variants.items():
        gain = result["speedup"]
        style = "bold green" if gain["low"] > 1 else "bold red" if gain["high"] < 1 else ""
        table.add_row(
            Text(name),
            milliseconds(result["latency_ms"]),
            Text.assemble((times(gain["median"]), style), f" [{gain['low']:.2f}, {gain['high']:.2f}]"),
            size(result["bytes"]),
            count(result["parameters"]),
            count(result["macs"]),
            *([story.measured_as(chain, list(variants), name, key) for _, key in measures] or [size(result["peak_memory_bytes"])]),
        )
    return table


def benchmark_note(benchmark: Record) -> Text:
    floor = benchmark["noise_floor"]
    shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in benchmark["input_shapes"].items())
    threads = benchmark["threads"] or "onnxruntime's own choice of"
    provider = next(iter(benchmark["variants"].values()))["provider"].removesuffix("ExecutionProvider")
    compared = next((result["quality"] for result in benchmark["variants"].values() if result.get("quality")), None)
    quality = f"; quality against the first model on {compared['samples']:,} samples (output {compared['output']})" if compared else ""
    return Text(
        f"{benchmark['rounds']} paired rounds on {provider}, {threads} thread{'s' * (threads != 1)}, {shapes}; "
        f"the same file twice differs by {figures(100 * abs(floor['median'] - 1), 2)}% "
        f"[{floor['low']:.3f}, {floor['high']:.3f}]{quality}",
        "dim",
    )


def family_table(manifest: Record, folder: Path) -> Table:
    """The members of a family, the largest first."""
    quality = [name for name in ("accuracy", "agreement", "kl", "cosine") if name in manifest["members"][0]]
    table = _table(f"Models in {folder}", "target", "file", "reached", "latency", "speed-up", "size", "params", *quality)
    for member in manifest["members"]:
        table.add_row(
            member["target"],
            Text(member["file"]),
            percent(member["measured"] / member["given"]),
            "-" if member["latency_ms"] is None else milliseconds(member["latency_ms"]),
            "-" if member["speedup"] is None else times(member["speedup"]),
            size(member["bytes"]),
            count(member["parameters"]),
            *(figures(member[name], 2) if name == "kl" else percent(member[name]) for name in quality),
        )
    return table


def quality_table(comparison: Record) -> Table:
    """A model against the original on the same samples."""
    table = _table(f"Quality on {comparison['samples']:,} samples (output {comparison['output']})", "", "value", "95% interval")
    names = (
        ("accuracy_before", "accuracy of the original", percent),
        ("accuracy_after", "accuracy of the model", percent),
        ("drop", "accuracy lost, paired", lambda value: percent(value, 2)),
        ("agreement", "same prediction", percent),
        ("kl", "KL divergence (nats)", figures),
        ("cosine", "cosine to the original", lambda value: f"{value:.4f}"),
        ("relative_error", "relative error", percent),
    )
    for key, label, form in names:
        if (interval := comparison.get(key)) is not None:
            table.add_row(label, form(interval["value"]), f"{form(interval['low'])} to {form(interval['high'])}")
    return table


def sites_table(sites: Sequence[Record]) -> Table:
    """Units kept per site, with bars."""
    table = _table("Kept", "site", "", "kept", "of", "", left=2)
    for site in sites[:_ROWS]:
        share = site["kept"] / site["units"]
        table.add_row(Text(site["site"]), _bar(share), f"{site['kept']:,}", f"{site['units']:,}", percent(share, 0))
    if len(sites) > _ROWS:
        rest = sites[_ROWS:]
        kept, units = sum(site["kept"] for site in rest), sum(site["units"] for site in rest)
        table.add_row(f"{len(rest)} more sites", _bar(kept / units), f"{kept:,}", f"{units:,}", percent(kept / units, 0))
    return table


def _trials(record: Record, trials: Sequence[Record]) -> Table:
    """int8 schemes tried on the unpruned model."""
    table = _table("int8: schemes tried on the unpruned model", "scheme", "", "speed-up over float", story.divergence(record), left=2)
    for trial in trials:
        chosen = Text("taken", "green") if trial["scheme"] == record["int8"]["scheme"] else Text()
        table.add_row(trial["scheme"], chosen, times(trial["speedup"]), figures(trial["divergence"]))
    return table


def _sensitive(record: Record) -> list[Table]:
    """The products that int8 costs most."""
    known = record["int8"]
    groups = sorted(known["groups"], key=lambda group: -group["error"])[:_SENSITIVE]
    if not groups:
        return []
    table = _table(f"int8: most sensitive of {len(known['groups'])} groups", "products", "error alone", "", left=1)
    table.columns[-1].justify = "left"
    for group in groups:
        table.add_row(Text(story.group_name(group)), figures(group["error"]), story.group_state(group, known))
    return [table]


def _bar(share: float, style: str = "cyan") -> Text:
    filled = round(_BAR * share)
    return Text.assemble(("━" * filled, style), ("━" * (_BAR - filled), "bright_black"))


def refusals_table(refusals: Sequence[Record]) -> Table:
    table = _table("Left alone", "code", "where", "why", "what to do", left=4)
    for refusal in refusals:
        table.add_row(refusal["code"], Text(refusal["site"]), Text(refusal["reason"]), Text(refusal["hint"]))
    return table


def _gates(gates: Sequence[Record]) -> Table:
    table = _table("Gates", "gate", "", "value", "limit", left=2)
    for gate in gates:
        passed = Text("passed", "green") if gate["passed"] else Text("failed", "bold red")
        table.add_row(gate["name"], passed, percent(gate["value"], 2), percent(gate["limit"], 2))
    return table


def _files(record: Record, run_dir: Path | None) -> Table | None:
    rows = []
    if (record.get("output") or {}).get("path"):
        rows.append(("model", f"{record['output']['path']} ({size(record['output']['bytes'])})"))
    if run_dir is not None:
        rows.append(("report", str(run_dir / "report.html")))
        rows.append(("plan", str(run_dir / "plan.json")))
    return _pairs(rows) if rows else None


def written(what: str, path: Path) -> Table:
    """Where a file went."""
    return _pairs([(what, str(path))])


def plan_tables(plan: Plan) -> list[RenderableType]:
    """What a plan keeps, and what it computes in integers."""
    parts: list[RenderableType] = []
    if plan.units:
        parts.append(sites_table([{"site": site, "units": units, "kept": len(plan.kept[site])} for site, units in plan.units.items()]))
    if plan.int8 is not None:
        parts.append(Text(f"{len(plan.int8.products):,} products compute in int8: {plan.int8.describe()}"))
    return parts


def inspect_tables(found: Record) -> list[RenderableType]:
    """Sites with their share of the model, then refusals."""
    shapes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in found["inputs"].items())
    model = found["model"]
    head = _pairs(
        [
            ("model", f"{model['path']}, opset {model['opset']}, {model['nodes']:,} nodes, {size(model['bytes'])}"),
            ("parameters", count(model["parameters"])),
            ("MACs", f"{count(found['macs'])} for {shapes}"),
            ("tokens", _tokens_told(found["tokens"])),
        ]
    )
    timed = any("time_share" in site for site in found["sites"])
    last = ["latency", "of all time"] if timed else [""]
    table = _table("Can be pruned", "site", "units", "parameters", "MACs", "of all MACs", *last)
    for site in found["sites"]:
        unit = {"ffn": "neurons", "qk": "directions", "vo": "directions"}.get(site["kind"], site["kind"])
        figures_ = (f"{site['units']:,} {unit}", count(site["parameters"]), count(site["macs"]), percent(site["macs_share"]))
        clock = (milliseconds(site["ms"]), percent(site["time_share"])) if timed else (_bar(min(site["macs_share"], 1.0)),)
        table.add_row(Text(site["site"]), *figures_, *clock)
    names = {site["site"] for site in found["sites"]}
    # What lies inside heads is theirs already.
    apart = [s for s in found["sites"] if s["kind"] not in ("qk", "vo") or s["site"].replace(s["kind"], "heads") not in names]
    total = sum(site["macs_share"] for site in apart)
    table.add_section()
    sums = [count(sum(site[key] for site in apart)) for key in ("parameters", "macs")]
    times_ = [milliseconds(sum(s["ms"] for s in apart)), percent(sum(s["time_share"] for s in apart))] if timed else []
    table.add_row("all", "", *sums, percent(total), *times_)
    parts: list[RenderableType] = [head, table if found["sites"] else Text("Nothing in this graph can be pruned.", "bold yellow")]
    if found["refusals"]:
        parts.append(refusals_table(found["refusals"]))
    return parts


def _tokens_told(tokens: Record) -> str:
    """Where tokens can leave, or why they cannot, on one line."""
    if "refusal" in tokens:
        return f"all stay: {tokens['refusal']['reason']} ({tokens['refusal']['code']})"
    places = f"{tokens['places']} attention{'s' if tokens['places'] != 1 else ''}"
    some = "some" if tokens["count"] is None else f"some of {tokens['count']}"
    return f"{some} can leave behind {places} (--passes tokens)"


def why_tables(found: Record) -> list[RenderableType]:
    """The answers to ``inspect --why``, and what the sites among them weigh."""
    weights = {site["site"]: site for site in found["sites"]}
    parts: list[RenderableType] = []
    for answer in found["why"]:
        rows = list(answer["details"])
        if answer["about"] == "site":
            site = weights[answer["name"]]
            clock = [("latency", f"{milliseconds(site['ms'])}, {percent(site['time_share'])} of all time")] if "ms" in site else []
            macs = f"{count(site['macs'])}, {percent(site['macs_share'])} of all"
            rows = [("parameters", count(site["parameters"])), ("MACs", macs), *clock, *rows]
        head = Text.assemble((answer["name"], "bold cyan"), f"  {answer['summary']}")
        parts.append(Group(head, _labelled(rows)) if rows else head)
    return parts


def _labelled(rows: Sequence[tuple[str, str]]) -> Table:
    """Pairs of which a run under one label shows it once."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", max_width=_LABEL, overflow="fold")
    table.add_column(overflow="fold")
    last = ""
    for label, text in rows:
        table.add_row(Text("" if label == last else label), Text(text))
        last = label
    return table


def pass_facts(item: Pass) -> dict[str, Any]:
    """What a pass does. ``kind``: it takes units out, computes in other numbers, or leaves the numbers as they are."""
    return {
        "name": item.name,
        "summary": item.summary,
        "detail": item.detail,
        "kind": item.effect,
        "needs": list(item.needs),
        "tried": list(getattr(item, "finishing", ())),
    }


def pass_table(passes: Sequence[Pass]) -> Table:
    table = _table("Passes", "name", "what it does", "kind", "needs", left=4)
    for item in passes:
        facts = pass_facts(item)
        table.add_row(item.name, item.summary, facts["kind"], ", ".join(item.needs) or "nothing")
    for column in (table.columns[0], table.columns[2]):
        column.no_wrap = True
    return table


def pass_details(item: Pass) -> Group:
    facts = pass_facts(item)
    rows = [("kind", facts["kind"]), ("needs", ", ".join(item.needs) or "nothing")]
    if facts["tried"]:
        rows.append(("tried", f"in every run on {', '.join(facts['tried'])} and kept if faster; named in --passes, it runs unasked"))
    return Group(Text(item.name, "bold"), Text(item.summary), Text(), Text(item.detail), Text(), _pairs(rows))


def doctor_table(facts: Record, providers: Mapping[str, str]) -> Group:
    rows = [(name, f"{version}") for name, version in facts["distributions"].items()]
    machine = [("system", facts["os"]), ("processor", f"{facts['cpu']}, {facts['cores']} cores"), ("memory", size(facts["memory_bytes"]))]
    lines = [
        Text.assemble(
            (" ok   " if state == "ok" else " fail ", "green" if state == "ok" else "yellow"),
            name,
            ("" if state == "ok" else f"  {state}", "dim"),
        )
        for name, state in providers.items()
    ]
    title = [Text("\nExecution providers", "bold")] if providers else []
    return Group(_pairs([("python", facts["python"]), *machine, *rows]), *title, *lines)
