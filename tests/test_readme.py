"""The README is run: every command in it, every block of Python, every link."""

from __future__ import annotations

import logging
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxprune import errors
from onnxprune.calibration.source import load_calibration
from onnxprune.cli import main
from onnxprune.graph.model import load
from tests.markdown import ROOT, broken_links, commands, fenced
from tests.passes.cases import GPT2, arrays, brief_benchmarks, clockwork, easy_model

README = ROOT / "README.md"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader would be: a model of which much can go, named model.onnx, and its data."""
    easy_model(GPT2).save(tmp_path / "model.onnx")
    np.savez(tmp_path / "data.npz", **arrays(GPT2, 64))  # type: ignore[arg-type]
    monkeypatch.chdir(tmp_path)
    clockwork(monkeypatch)
    brief_benchmarks(monkeypatch)
    return tmp_path


@pytest.fixture
def package_log() -> Iterator[None]:
    """The command line takes over the package's log; give it back."""
    log = logging.getLogger("onnxprune")
    before = log.handlers, log.propagate, log.level
    yield
    log.handlers, log.propagate = before[0], before[1]
    log.setLevel(before[2])


def test_extras_and_targets_that_are_named_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    seen = set()
    for words in commands(README):
        seen.add(words[0])
        if words[0] == "pip":
            assert words[1] == "install"
            for package in words[2:]:
                name, extra = re.fullmatch(r"(\w+)\[(\w+)\]", package).groups()  # type: ignore[union-attr]
                assert name == project["name"]
                assert extra in project["optional-dependencies"]
        elif words[0] == "make":
            assert set(words[1:]) <= targets
        else:
            assert words[0] in project["scripts"], words
    assert seen == {"pip", "make", "onnxprune"}


@pytest.mark.slow
@pytest.mark.usefixtures("package_log")
def test_every_command_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = (folder / "model.onnx").read_bytes()
    done = 0
    for program, *words in commands(README):
        if program != "onnxprune":
            continue
        with pytest.raises(SystemExit) as stopped:
            main.main(words)
        assert stopped.value.code == 0, (words, capsys.readouterr().err)
        done += 1
    assert done >= 10
    assert (folder / "model.onnx").read_bytes() == model
    assert (folder / "small.onnx").stat().st_size < len(model)
    assert (folder / "model.pruned.onnx").stat().st_size < len(model)
    assert (folder / "small.run" / "report.html").exists()


@pytest.mark.slow
def test_every_block_of_python_runs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = arrays(GPT2, 64)
    for block in fenced(README, "python"):
        exec(compile(block, "README.md", "exec"), names)
    assert len(load_calibration("data.npz", load("model.onnx"))) == 64
    assert names["result"].output == Path("small.onnx")
    said = capsys.readouterr().out
    assert "layer.0.heads" in said
    assert "Ratio(median=" in said


def test_exit_codes_are_those_of_the_errors() -> None:
    kinds = [getattr(errors, name) for name in dir(errors)]
    codes = {kind.exit_code for kind in kinds if isinstance(kind, type) and issubclass(kind, errors.OnnxPruneError)}
    sentence = re.search(r"Exit codes are stable[^:]*:\s(.*?)\.\n", README.read_text(), re.DOTALL)
    assert sentence
    assert {int(code) for code in re.findall(r"\b(\d+)\s", sentence[1])} == codes | {0, 1, 130}


def test_links_lead_somewhere() -> None:
    assert broken_links(README) == []


def test_nothing_is_left_to_be_filled_in() -> None:
    assert re.findall(r"\b[A-Z]+_TABLE\b|TODO|FIXME|TBD|XXX", README.read_text()) == []
