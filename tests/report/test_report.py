"""The report and the schemas against a real run."""

from __future__ import annotations

import copy
import json
import re
from functools import cache
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from rich.console import Console

from onnxprune.report import figures, story
from onnxprune.report.html import render, write_report
from onnxprune.report.tables import run_tables
from tests.cli.cases import QUICK, fill, run
from tests.passes.cases import brief_benchmarks

Record = dict[str, Any]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a benchmark and a gate that holds."""
    folder = tmp_path_factory.mktemp("run")
    fill(folder)
    with pytest.MonkeyPatch.context() as patch:
        brief_benchmarks(patch)
        result = run(folder / "model.onnx", "--calib", folder / "data.npz", *QUICK[:-1], "--max-drop", "99%", "-q")
    assert result.exit_code == 0, result.stderr
    return folder / "model.pruned.run"


@pytest.fixture
def record(run_dir: Path) -> Record:
    return json.loads((run_dir / "run.json").read_text())  # type: ignore[no-any-return]


@cache
def validator(name: str) -> Any:
    schema = json.loads((files("onnxprune.report") / "schema" / f"{name}.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("name", ["run", "plan"])
def test_a_real_run_is_what_its_schema_says(run_dir: Path, name: str) -> None:
    content = json.loads((run_dir / f"{name}.json").read_text())
    validator(name).validate(content)
    assert set(content) == set(validator(name).schema["properties"])
    with pytest.raises(jsonschema.ValidationError):
        validator(name).validate({**content, "passes": "heads"})


def test_a_dry_run_is_what_its_schema_says(tmp_path: Path) -> None:
    fill(tmp_path)
    run(tmp_path / "model.onnx", "--calib", tmp_path / "data.npz", *QUICK, "--dry-run", "-q")
    validator("run").validate(json.loads((tmp_path / "model.pruned.run" / "run.json").read_text()))


class Page(HTMLParser):
    """Tags that are opened and closed, text, and every address."""

    EMPTY = frozenset({"meta", "br", "line", "rect", "circle", "path"})

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
    assert gained == story.Speed(2.0, 1.9, 2.1, 1.25, 1.6)
    assert gained.certain
    assert story.split(record) == "1.25x from finishing the graph, 1.60x from pruning"


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
    gate = {"name": "accuracy drop", "limit": 0.01, "value": 0.02, "passed": False}
    assert verdict(record) == ("good", "Done")
    assert verdict(record, gates=[gate]) == ("bad", "Gate failed")
    assert verdict(record, target__already_met=True) == ("plain", "Already met")
    assert verdict(record, target__measured=record["target"]["goal"] * 1.1) == ("warn", "Target missed")
    assert verdict(record, target__measured=record["target"]["goal"] * 1.01) == ("good", "Done")
    assert verdict(record, verification__masked_equals_sliced__passed=False) == ("bad", "Verification failed")


def test_the_drawing_of_latencies_keeps_their_ratios(record: Record) -> None:
    variants = record["benchmark"]["variants"]
    for name, latency in (("file as given", 4.0), ("finished original", 3.0), ("pruned", 1.0)):
        variants[name]["latency_ms"] = latency
    first, second, third = figures.latency_bars(record["benchmark"])
    assert first["width"] / third["width"] == pytest.approx(4)
    assert second["width"] / third["width"] == pytest.approx(3)
    assert all(bar["low"] <= bar["width"] <= bar["high"] for bar in (first, second, third))


def test_ticks_are_round_and_inside(record: Record) -> None:
    assert figures._ticks(0.11, 0.21) == pytest.approx([0.12, 0.14, 0.16, 0.18, 0.2])
    assert figures._ticks(3.0, 47.0) == pytest.approx([10, 20, 30, 40])


def test_tables_name_every_site_refusal_and_gate(record: Record) -> None:
    record["refusals"] = [{"code": "OP101", "site": "/odd/attention", "reason": "two nodes read it", "hint": "exclude it"}]
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for part in run_tables(record, Path("small.run")):
        console.print(part)
    text = console.export_text()
    for expected in (
        "OP101",
        "/odd/attention",
        "exclude it",
        "passed",
        "small.run/report.html",
        *(site["site"] for site in record["sites"]),
    ):
        assert expected in text
