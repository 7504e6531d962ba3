from __future__ import annotations

import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.export import folders


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports are made offline: any connection is an error."""

    def refuse(*words: Any) -> None:
        raise AssertionError(f"something connects to {words[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    places: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in places:
            places[kind] = folders.save(tmp_path_factory.mktemp("models") / kind, kind)
        return places[kind]

    return make


@pytest.fixture
def model(_made: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A private copy of the model folder of a kind."""
    return lambda kind: Path(shutil.copytree(_made(kind), tmp_path / f"my-{kind}", dirs_exist_ok=True))
