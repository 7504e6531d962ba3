"""Passes by name, and passes from other packages."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

import pytest

from onnxprune.errors import InputError
from onnxprune.graph.model import Model
from onnxprune.passes import base
from onnxprune.passes.base import RewritePass, WidthPass, registry, select


def unchanged(model: Model) -> tuple[Model, int]:
    return model, 0


EXTRA = RewritePass("extra", unchanged, "nothing", "nothing at all")


@pytest.fixture
def fresh_registry() -> Iterator[None]:
    registry.cache_clear()
    yield
    registry.cache_clear()


def offer(monkeypatch: pytest.MonkeyPatch, item: object) -> None:
    class Entry:
        name, dist = "extra", "some-package 1.0"

        def load(self) -> object:
            return item

    def entries(*, group: str) -> list[Entry]:
        assert group == base.ENTRY_POINTS
        return [Entry()]

    monkeypatch.setattr(importlib.metadata, "entry_points", entries)


def test_passes_come_in_the_order_asked_for_each_once() -> None:
    assert [item.name for item in select(["ffn", " heads ", "ffn", ""])] == ["ffn", "heads"]


def test_width_passes_say_their_kind_and_rewrites_are_apart() -> None:
    widths = {item.name: item.kind for item in registry().values() if isinstance(item, WidthPass)}
    assert widths == {"heads": "heads", "ffn": "ffn", "channels": "channels", "qk": "qk", "vo": "vo"}
    assert isinstance(registry()["residual-sum"], RewritePass)
    assert all(item.summary and item.detail for item in registry().values())


@pytest.mark.parametrize(("wrong", "near"), [("head", "heads"), ("fnn", "ffn"), ("residual_sum", "residual-sum")])
def test_an_unknown_pass_suggests_the_nearest(wrong: str, near: str) -> None:
    with pytest.raises(
        InputError,
        match=f"unknown pass '{wrong}'; did you mean '{near}'.*known passes: heads, ffn, channels, .*int8, .*residual-sum",
    ):
        select(["heads", wrong])


def test_a_name_near_nothing_lists_what_there_is() -> None:
    with pytest.raises(InputError) as caught:
        select(["zzz"])
    assert "did you mean" not in str(caught.value)
    assert "known passes: heads, ffn" in str(caught.value)


def test_no_pass_at_all_is_an_error() -> None:
    with pytest.raises(InputError, match="no pass named; known passes"):
        select(["", " "])


@pytest.mark.usefixtures("fresh_registry")
def test_installed_packages_offer_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, EXTRA)
    assert select(["extra"]) == (EXTRA,)


@pytest.mark.usefixtures("fresh_registry")
def test_an_entry_point_that_is_no_pass_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, object())
    with pytest.raises(InputError, match=r"entry point extra of some-package 1\.0 is not an onnxprune pass"):
        registry()


@pytest.mark.usefixtures("fresh_registry")
def test_a_built_in_pass_cannot_be_replaced_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, RewritePass("heads", unchanged, "nothing", "nothing at all"))
    assert isinstance(registry()["heads"], WidthPass)
