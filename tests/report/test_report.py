"""The report and the schemas against a real run."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from rich.console import Console

from onnxprune.graph.token_plan import POLICIES, TokenCut, TokenPlan
from onnxprune.passes.tokens import Schedule
from onnxprune.report import figures, story
from onnxprune.report.html import render, write_report
from onnxprune.report.tables import plan_tables, run_tables
from onnxprune.runtime.measure import Ratio
from onnxprune.search.plan import load_plan
from tests.cli.cases import QUICK, fill, run
from tests.passes.cases import brief_benchmarks

Record = dict[str, Any]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a benchmark and a gate that holds."""
    return run_of(tmp_path_factory.mktemp("run"))


def run_of(folder: Path, *words: str) -> Path:
    fill(folder)
    with pytest.MonkeyPatch.context() as patch:
        brief_benchmarks(patch)
        result = run(folder / "model.onnx", "--calib", folder / "data.npz", *QUICK[:-1], "--max-drop", "99%", *words, "-q")
    assert result.exit_code == 0, result.stderr
    return folder / "model.pruned.run"


@pytest.fixture(scope="module")
def integer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads and neurons removed, and products in int8; faster or not is not the matter here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("onnxprune.passes.int8.ratio", lambda *args: Ratio(2.0, 1.9, 2.1))
        return run_of(tmp_path_factory.mktemp("integers"), "--passes", "heads,ffn,int8")


@pytest.fixture
def integers(integer_dir: Path) -> Record:
    return json.loads((integer_dir / "run.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture
def record(run_dir: Path) -> Record:
    return json.loads((run_dir / "run.json").read_text())  # type: ignore[no-any-return]


@cache
def validator(name: str) -> Any:
    schema = json.loads((files("onnxprune.report") / "schema" / f"{name}.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_token_plans_of_every_policy_are_what_the_schemas_say() -> None:
    for policy in POLICIES:
        cut = TokenCut("place", "softmax", 0.5, 1, positions=(0, 2), threshold=0.5, predictor=(0.25, -1.0))
        plan = TokenPlan(policy, (cut, TokenCut("later", "softmax", 0.25, 2)))
        schema = validator("plan").schema["properties"]["tokens"]
        jsonschema.validate(json.loads(json.dumps(plan.as_dict())), schema)
        told = validator("run").schema["properties"]["tokens"]["properties"]
        jsonschema.validate(json.loads(json.dumps(plan.summary())), told["chosen"])
        jsonschema.validate(json.loads(json.dumps(Schedule(plan, 0.1, 0.5).as_dict())), told["schedules"]["items"])


@pytest.mark.parametrize("name", ["run", "plan"])
def test_a_real_run_is_what_its_schema_says(run_dir: Path, name: str) -> None:
    content = json.loads((run_dir / f"{name}.json").read_text())
    validator(name).validate(content)
    assert set(content) == set(validator(name).schema["properties"])
    with pytest.raises(jsonschema.ValidationError):
        validator(name).validate({**content, "passes": "heads"})


def test_a_run_in_int8_is_what_its_schema_says(integer_dir: Path) -> None:
    for name in ("run", "plan"):
        validator(name).validate(json.loads((integer_dir / f"{name}.json").read_text()))
    record = json.loads((integer_dir / "run.json").read_text())
    assert record["int8"]["scheme"] in [trial["scheme"] for trial in record["int8"]["trials"]]
    assert list(record["chain"]) == ["int8", "pruned", "pruned + int8"] == list(record["benchmark"]["variants"])[2:]
    broken = {**record["int8"], "groups": [{"tensor": "x"}]}
    with pytest.raises(jsonschema.ValidationError):
        validator("run").validate({**record, "int8": broken})


def test_a_dry_run_is_what_its_schema_says(tmp_path: Path) -> None:
    fill(tmp_path)
    run(tmp_path / "model.onnx", "--calib", tmp_path / "data.npz", *QUICK, "--dry-run", "-q")
    validator("run").validate(json.loads((tmp_path / "model.pruned.run" / "run.json").read_text()))


class Page(HTMLParser):
    """Tags that are opened and closed, text, and every address."""

    EMPTY = frozenset({"meta", "br", "line", "rect", "circle", "path", "image", "use"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_report_stands_alone(record: Record) -> None:
    text = render(record)
    page = Page(text)
    assert page.open == []
    assert page.addresses == []
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?://", text)
    assert "prefers-color-scheme: dark" in text


def test_the_report_says_what_the_run_found(record: Record) -> None:
    words = " ".join(" ".join(Page(render(record)).words).split())
    gained = story.speed(record)
    assert gained is not None
    for expected in (
        f"{gained.total:.2f}x",
        record["input"]["sha256"],
        record["plan_sha256"],
        record["output"]["sha256"],
        record["environment"]["onnxruntime"],
        "masked equals sliced",
        "1 - agreement",
        *(site["site"] for site in record["compensation"]),
        *(step["step"] for step in record["search"]),
    ):
        assert str(expected) in words, expected


def test_heads_are_drawn_in_their_order_when_the_plan_is_known(record: Record, run_dir: Path) -> None:
    heads = next(site for site in record["sites"] if site["kind"] == "heads")
    heads["kept"] = 2
    row = next(row for row in figures.layers({**record, "plan_kept": {heads["site"]: [1, 3]}}) if "heads" in row["sites"])
    assert row["sites"]["heads"]["boxes"] == [False, True, False, True]
    assert "Heads in their original order" in write_report(run_dir, run_dir / "again.html").read_text()
    assert "Heads are counted" in render(record)


def test_text_from_the_model_cannot_become_markup(record: Record) -> None:
    record["refusals"] = [{"code": "OP101", "site": "<script>alert(1)</script>", "reason": "a & b", "hint": "<b>"}]
    record["input"]["path"] = '"><img src=x>'
    page = Page(render(record))
    assert not {"script", "img", "b"} & (set(page.tags) - {"b"})
    assert "<script>alert(1)</script>" in page.words


def test_a_record_without_benchmark_or_verification_has_a_report(record: Record) -> None:
    for missing in (["benchmark"], ["benchmark", "verification", "output"]):
        for name in missing:
            record.pop(name, None)
        page = Page(render({"output": None, **record}))
        assert page.open == []
    assert "Plan only" in page.words


# --- the story ---------------------------------------------------------------------------------------------------------------------


def test_finishing_and_pruning_multiply_to_the_whole(record: Record) -> None:
    variants = record["benchmark"]["variants"]
    variants["finished original"]["speedup"] = {"median": 1.25, "low": 1.2, "high": 1.3}
    variants["pruned"]["speedup"] = {"median": 2.0, "low": 1.9, "high": 2.1}
    gained = story.speed(record)
    assert gained == story.Speed(2.0, 1.9, 2.1, {"finishing the graph": 1.25, "pruning": 1.6})
    assert gained.certain
    assert story.split(record) == "1.25x from finishing the graph, 1.60x from pruning"


def speeds(record: Record, **gains: float) -> None:
    """Variants of these names and speed-ups in place of the record's own."""
    some = record["benchmark"]["variants"]["pruned"]
    record["benchmark"]["variants"] = {
        name.replace("_and_", " + ").replace("_", " "): {**some, "speedup": {"median": gain, "low": gain * 0.99, "high": gain * 1.01}}
        for name, gain in gains.items()
    }


@pytest.mark.parametrize(
    ("gains", "split"),
    [
        ({"int8": 2.5}, "1.25x from finishing the graph, 2.00x from int8"),
        ({"int8": 2.5, "pruned": 2.0, "pruned_and_int8": 4.0}, "1.25x from finishing the graph, 1.60x from pruning, 2.00x from int8"),
        ({"pruned": 2.5, "pruned_and_fp16": 3.0}, "1.25x from finishing the graph, 2.00x from pruning, 1.20x from fp16"),
        ({"finished_copy": 1.25}, "1.25x from finishing the graph"),
    ],
)
def test_every_step_of_the_chain_gets_its_factor(record: Record, gains: dict[str, float], split: str) -> None:
    speeds(record, file_as_given=1.0, finished_original=1.25, **gains)
    assert story.split(record) == split
    gained = story.speed(record)
    assert gained is not None
    assert gained.total == list(gains.values())[-1]
    assert f"{gained.total:.2f}x as fast" in story.headline(record)


def test_a_speed_up_inside_the_noise_is_not_claimed(record: Record) -> None:
    record["benchmark"]["variants"]["pruned"]["speedup"] = {"median": 1.01, "low": 0.98, "high": 1.04}
    assert "no measurable change of latency" in story.headline(record)


def verdict(record: Record, **changes: Any) -> tuple[str, str]:
    changed = copy.deepcopy(record)
    for path, value in changes.items():
        place: Any = changed
        *parents, last = path.split("__")
        for parent in parents:
            place = place[parent]
        place[last] = value
    found = story.verdict(changed)
    return found.tone, found.title


def test_verdicts(record: Record) -> None:
    speeds(record, file_as_given=1.0, finished_original=1.1, pruned=2.0)
    gate = {"name": "accuracy drop", "limit": 0.01, "value": 0.02, "passed": False}
    assert verdict(record) == ("good", "Done")
    assert verdict(record, gates=[gate]) == ("bad", "Gate failed")
    assert verdict(record, target__already_met=True) == ("plain", "Already met")
    assert verdict(record, target__measured=record["target"]["goal"] * 1.1) == ("warn", "Target missed")
    assert verdict(record, target__measured=record["target"]["goal"] * 1.01) == ("good", "Done")
    assert verdict(record, verification__masked_equals_sliced__passed=False) == ("bad", "Verification failed")
    assert verdict(record, benchmark__variants__pruned__speedup__high=0.99) == ("warn", "Slower")
    assert story.verdict({**record, "target": {**record["target"], "asked": "latency=auto", "goal": None}}).detail.startswith(
        "Latency as low"
    )


@pytest.mark.parametrize(("unit", "advised"), [("ms", False), ("macs", True)])
def test_what_is_slower_at_a_counted_target_is_told_of_the_clock(record: Record, unit: str, advised: bool) -> None:
    speeds(record, file_as_given=1.0, finished_original=1.1, pruned=2.0)
    record["benchmark"]["variants"]["pruned"]["speedup"]["high"] = 0.99
    record["target"]["unit"] = unit
    assert ("--target-latency" in story.verdict(record).detail) == advised


@pytest.mark.parametrize(
    ("given", "written", "words"),
    [
        (3.0, False, "The file as given meets the target, 60% of the latency (4.00 ms)."),
        (6.0, False, "3.50 ms instead of 6.00 ms as given; --write-unpruned writes the finished copy."),
        (6.0, True, "3.50 ms instead of 6.00 ms as given; the finished copy was written."),
    ],
)
def test_a_target_that_is_met_says_by_which_file(record: Record, given: float, written: bool, words: str) -> None:
    met = {"asked": "latency=60%", "unit": "ms", "goal": 4.0, "given": given, "finished": 3.5, "already_met": True}
    record["output"] = record["output"] if written else None
    found = story.verdict({**record, "target": {**record["target"], **met}})
    assert found.title == "Already met"
    assert found.detail.endswith(words)


def test_the_drawing_of_latencies_keeps_their_ratios(record: Record) -> None:
    variants = record["benchmark"]["variants"]
    for name, latency in (("file as given", 4.0), ("finished original", 3.0), ("pruned", 1.0)):
        variants[name]["latency_ms"] = latency
    first, second, third = figures.latency_bars(record["benchmark"])
    assert first["width"] / third["width"] == pytest.approx(4)
    assert second["width"] / third["width"] == pytest.approx(3)
    assert all(bar["low"] <= bar["width"] <= bar["high"] for bar in (first, second, third))


# --- tokens ------------------------------------------------------------------------------------------------------------------------


def with_tokens(record: Record, *samples: Record) -> Record:
    cuts = [{"place": f"p{block}", "softmax": f"s{block}", "share": 0.5, "block": block} for block in (1, 4)]
    known = {"chosen": {"policy": "drop", "cuts": cuts}, "schedules": [], "samples": list(samples)}
    changed = {**record, "tokens": known}
    validator("run").validate(changed)
    return changed


def test_tokens_that_leave_are_drawn_and_the_report_still_stands_alone(record: Record) -> None:
    image = {"stayed": [2, 0, 1, 2, 2], "picture": {"rows": 2, "columns": 2, "others": 1, "png": "iVBORw0KGgo="}}
    text = {"stayed": [2, 0, 1, None], "ids": [5, 6, 7, 0], "words": ["<b>bold</b>", "is", "##land", None]}
    changed = with_tokens(record, image, text)
    html = render(changed)
    assert html == render(changed)
    page = Page(html)
    assert page.open == []
    assert page.addresses == ["data:image/png;base64,iVBORw0KGgo=", "#token-sample-1", "#token-sample-1"]
    assert "<b>bold</b>" not in html
    words = " ".join(page.words)
    assert "<b>bold</b>" in words
    assert "behind attention 4" in words
    assert "stays to the end" in words


def test_tokens_without_samples_or_tokenizer_are_shown_as_far_as_known(record: Record) -> None:
    assert "Which tokens stay" not in words_of(record)
    bare = words_of(with_tokens(record))
    assert "Which tokens stay" in bare
    assert "held-back samples below" not in bare
    assert "#5 #6" in words_of(with_tokens(record, {"stayed": [2, 2], "ids": [5, 6]}))
    assert "4 to 6" in words_of(with_tokens(record, {"stayed": [2] * 4}, {"stayed": [2] * 6}))


# --- int8 and finishing ------------------------------------------------------------------------------------------------------------


def words_of(record: Record) -> str:
    return " ".join(" ".join(Page(render(record)).words).split())


def printed(record: Record) -> str:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in run_tables(record, Path("small.run")):
        console.print(part)
    return console.export_text()


def test_the_report_shows_the_chain_with_its_quality(integers: Record) -> None:
    integers["chain"]["int8"]["agreement"]["value"] = 0.876
    integers["chain"]["pruned"]["kl"]["value"] = 0.123
    for text in (words_of(integers), printed(integers)):
        for expected in ("finished original", "pruned + int8", "87.6%", "0.12", "same"):
            assert expected in text, expected


def test_schemes_and_sensitive_products_are_shown(integers: Record) -> None:
    known = integers["int8"]
    known["groups"] = [
        {"tensor": "a", "site": "layer.0.ffn", "products": ["up"], "macs": 30.0, "error": 0.4, "smoothed": True},
        {"tensor": "b", "site": None, "products": ["query", "key"], "macs": 10.0, "error": 0.1, "smoothed": False},
        {"tensor": "c", "site": None, "products": ["scores"], "macs": 60.0, "error": 0.8, "smoothed": False},
    ]
    known["float"] = ["key", "query"]
    for text in (words_of(integers), printed(integers)):
        for expected in (known["scheme"], "layer.0.ffn: up", "int8, smoothed", "query (+1)", "in float: query (+1)"):
            assert expected in text, expected
        assert "2 of 4 products compute in int8" in text
    assert story.integers(integers) == story.Integers(known["scheme"], 2, 4, 0.9, ("query (+1)",))
    drawn = figures.sensitivity(known)["rows"]
    assert [(row["name"], row["part"], row["share"], row["state"]) for row in drawn] == [
        ("scores", 1.0, "60.0%", "int8"),
        ("layer.0.ffn: up", 0.5, "30.0%", "int8, smoothed"),
        ("query (+1)", 0.125, "10.0%", "float"),
    ]


def test_beyond_a_page_groups_are_counted(integers: Record) -> None:
    known = integers["int8"]
    known["groups"] = [
        {"tensor": f"t{n}", "site": None, "products": [f"p{n}"], "macs": 1.0, "error": 1 / (n + 1), "smoothed": False} for n in range(40)
    ]
    known["float"] = ["p0", "p39"]
    assert figures.sensitivity(known) | {"rows": None} == {"rows": None, "more": 8, "in_float": 1}
    assert "8 more groups of smaller error, 1 of them in float" in words_of(integers)
    known["float"] = [f"p{n}" for n in range(9)]
    assert "in float: p0, p1, p2, p3, p4, p5 and 3 more" in story.kept(integers)


def test_int8_alone_has_no_sites_to_show(integers: Record) -> None:
    integers |= {"sites": [], "passes": ["int8"], "compensation": [], "chain": {"int8": integers["chain"]["int8"]}}
    speeds(integers, file_as_given=1.0, finished_original=1.25, int8=2.5)
    for text in (words_of(integers), printed(integers)):
        assert "2.50x as fast" in text
        assert "products compute in int8" in text
        for unwanted in ("What stays in each layer", "heads kept", "units kept", "Kept", "fisher, refit"):
            assert unwanted not in text.split("How this was made")[0], unwanted
    assert Page(render(integers)).open == []


def test_int8_that_does_not_pay_is_told(integers: Record) -> None:
    integers["int8"] |= {"scheme": None, "groups": [], "float": []}
    assert story.integers(integers) is None
    assert "nothing computes in int8" in story.kept(integers)
    assert "None was taken." in words_of(integers)


def test_a_plan_says_what_computes_in_int8(integer_dir: Path) -> None:
    plan = load_plan(integer_dir / "plan.json")
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(*plan_tables(replace(plan, kept={}, units={})))
    text = console.export_text()
    assert plan.int8 is not None
    assert f"{len(plan.int8.products)} products compute in int8: {plan.int8.describe()}" in text
    assert "Kept" not in text


def test_a_step_tells_every_loss_it_was_judged_by(record: Record) -> None:
    kept = record["search"][0]["kept"] if record["search"] else {}
    record["search"] = [
        {"step": "auto 82%", "kept": kept, "predicted": 1.0, "measured": None, "accuracy drop": 0.012, "expected drop": 0.034}
    ]
    assert "accuracy drop 1.20% expected drop 3.40%" in words_of(record)
    record["search"][0] = {"step": "beside all tokens", "kept": kept, "predicted": 1.0, "measured": 1.0, "divergence": 0.00123}
    assert "divergence 0.0012" in words_of(record)


def test_finishing_says_what_was_kept_and_why(record: Record) -> None:
    record["finishing"] = [
        {"name": "residual-sum", "places": 12, "speedup": 1.031, "kept": True, "why": "faster"},
        {"name": "fuse-attention", "places": 6, "speedup": 0.97, "kept": False, "why": "not faster"},
        {"name": "clean", "places": 0, "speedup": None, "kept": False, "why": "nothing to change"},
    ]
    text = words_of(record)
    for expected in ("residual-sum kept faster 12 1.031x", "fuse-attention left out not faster 6 0.970x", "nothing to change 0 -"):
        assert expected in text, expected
    table = " ".join(printed(record).split())
    assert "residual-sum 1.03x, fuse-attention left out (not faster), clean left out (nothing to change)" in table


def test_a_record_from_before_int8_has_a_report(record: Record) -> None:
    for name in ("chain", "finishing", "int8"):
        del record[name]
    assert Page(render(record)).open == []
    assert "same prediction" in printed(record)


def test_what_was_left_out_is_told_with_the_reason(record: Record) -> None:
    record["skipped"] = [{"step": "benchmark", "reason": "the model is too large"}]
    assert "Left out" in words_of(record)
    assert "benchmark the model is too large" in words_of(record)
    assert "Benchmark was left out: the model is too large" in " ".join(printed(record).split())


def test_ticks_are_round_and_inside(record: Record) -> None:
    assert figures._ticks(0.11, 0.21) == pytest.approx([0.12, 0.14, 0.16, 0.18, 0.2])
    assert figures._ticks(3.0, 47.0) == pytest.approx([10, 20, 30, 40])


def test_tables_name_every_site_refusal_and_gate(record: Record) -> None:
    record["refusals"] = [{"code": "OP101", "site": "/odd/attention", "reason": "two nodes read it", "hint": "exclude it"}]
    text = printed(record)
    for expected in (
        "OP101",
        "/odd/attention",
        "exclude it",
        "passed",
        "small.run/report.html",
        *(site["site"] for site in record["sites"]),
    ):
        assert expected in text
