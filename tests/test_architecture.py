"""Who may import whom: the drawing of the package, checked against the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "onnxprune"
FILES = sorted(PACKAGE.rglob("*.py"))
_JUDGES = {"benchmark", "verification", "report"}
_RUN = {"request", "outputs", "record"}
_BASE = {"errors", "runtime", "graph", "calibration"}
_DECIDE = _BASE | {"importance", "compensate", "quantize", "search", "passes"}

ALLOWED: dict[str, set[str]] = {
    "refusals": set(),
    "errors": {"refusals"},
    "runtime": {"errors"},
    "graph": {"errors", "refusals", "runtime", "quantize"},
    "calibration": {"errors", "runtime", "graph", "quantize"},
    "importance": {"errors"},
    "compensate": {"errors"},
    "quantize": {"errors"},
    "search": {"errors", "runtime", "graph", "calibration", "quantize"},
    "verification": _BASE,
    "request": _BASE,
    "passes": _DECIDE | {"verification", "request"},
    "outputs": {"errors", "graph", "search"},
    "benchmark": _DECIDE,
    "report": _DECIDE,
    "record": _DECIDE | {"report"},
    "options": _DECIDE,
    "proof": _DECIDE | {"verification"},
    "api": _DECIDE | _JUDGES | _RUN | {"options", "proof"},
    "nested": _DECIDE | _JUDGES | _RUN | {"api", "options", "proof"},
    "export": {"errors", "graph", "runtime", "outputs"},
    "cli": _DECIDE | _JUDGES | _RUN | {"api", "export", "nested"},
}
"""Room -> rooms it may import besides itself; later rooms know earlier ones, never the other way round."""

RESERVED = {
    "onnx_graphsurgeon": {"graph"},
    "torch": {"export"},
    "transformers": {"export"},
    "click": {"cli"},
    "rich": {"cli", "report"},
}
"""Packages that only some rooms may import."""


def room_of(path: Path) -> str:
    """The first name below the package: a folder or a module."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, typing_too: bool = True) -> Iterator[str]:
    """Absolute names of all imports of a file, those inside functions as well."""
    tree = ast.parse(path.read_text())
    hidden: set[ast.AST] = set()
    if not typing_too:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
                hidden.update(child for statement in node.body for child in ast.walk(statement))
    for node in ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def wrong_rooms(path: Path) -> list[str]:
    room = room_of(path)
    found = {name.split(".")[1] for name in imports(path, typing_too=False) if name.startswith("onnxprune.")}
    return sorted(other for other in found if other in ALLOWED and other != room and other not in ALLOWED[room])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_downwards_only(path: Path) -> None:
    room = room_of(path)
    if room in ("__init__", "__main__"):
        return
    assert room in ALLOWED, f"{room} has no place in the drawing"
    assert wrong_rooms(path) == [], f"{path} may import {sorted(ALLOWED[room])}"


def test_the_rooms_have_an_order() -> None:
    """The drawing itself has no circle."""
    placed: set[str] = set()
    while ready := {room for room, allowed in ALLOWED.items() if room not in placed and allowed - {room} <= placed}:
        placed |= ready
    assert placed == set(ALLOWED)


@pytest.mark.parametrize("package", sorted(RESERVED))
def test_packages_are_imported_where_they_belong(package: str) -> None:
    users = {room_of(path) for path in FILES if any(name.split(".")[0] == package for name in imports(path))}
    assert users <= RESERVED[package]


def test_scores_and_compensation_know_numbers_only() -> None:
    known = {"numpy", "scipy", "onnxprune", "__future__", "collections", "dataclasses", "typing", "math", "itertools"}
    for path in FILES:
        if room_of(path) in ("importance", "compensate", "quantize"):
            assert {name.split(".")[0] for name in imports(path)} <= known, path


def test_only_the_command_line_prints() -> None:
    for path in FILES:
        if room_of(path) == "cli":
            continue
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
        assert [ast.unparse(node) for node in calls if node.func.id in ("print", "input", "eval", "exec")] == [], path  # type: ignore[attr-defined]


def test_nothing_is_unpickled() -> None:
    for path in FILES:
        assert not {name.split(".")[0] for name in imports(path)} & {"pickle", "dill", "joblib", "shelve", "marshal"}, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert ast.unparse(node.value) == "False", path
