"""A plan as a file: what is written is what is read, and anything else is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxprune.errors import InputError, Refusal
from onnxprune.quantize.form import Int8Form
from onnxprune.quantize.ranges import Range
from onnxprune.search.plan import SCHEMA, Plan, digest, load_plan

CHANGES = {
    ("/layer.0/out:0", 1): np.arange(6, dtype=np.float32).reshape(2, 3),
    ("/layer.0/out:0", 2): np.array([0.5, -1.5], np.float32),
}


def make(**changes: Any) -> Plan:
    plan = Plan(
        version="0.1.0",
        input_sha256="ab" * 32,
        passes=("heads", "ffn"),
        rewrites=("residual-sum",),
        kept={"layer.0.heads": (0, 2), "layer.0.ffn": (), "layer.1.ffn": (0, 1, 2, 3)},
        units={"layer.0.heads": 4, "layer.0.ffn": 8, "layer.1.ffn": 4},
        target="macs=50%",
        predicted={"macs": 0.1 + 0.2},
        recipe={"importance": "fisher", "rounds": 4},
        objective={"output": "logits", "link": "softmax", "why": "the only output"},
        refusals=(Refusal("OP201", "layer.2.ffn", "no", "do something"),),
        changes=CHANGES,
    )
    return dataclasses.replace(plan, **changes)


STATIC = Int8Form("static", True, ("/up:0", "/down:0"), {"norm": Range(-1.5, 1 / 3), "act": Range(0.0, 6.0)})
DYNAMIC = Int8Form(
    "dynamic",
    False,
    ("/up:0",),
    factors={"/layer.0/norm:0": np.array([1.0, 2.5], np.float32)},
    tables=("/embeddings:0",),
    integers={"/up:0": np.array([[1, -127], [3, 4]], np.int8)},
)


@pytest.mark.parametrize("int8", [None, STATIC, DYNAMIC], ids=["float", "static", "smoothed"])
@pytest.mark.parametrize("changes", [CHANGES, {}], ids=["compensated", "not compensated"])
def test_a_plan_is_read_as_it_was_written(changes: Any, int8: Int8Form | None, tmp_path: Path) -> None:
    plan = make(changes=changes, int8=int8, example={"x": (8, 16), "mask": (8, 4)})
    assert plan.save(tmp_path / "plan.json") == tmp_path / "plan.json"
    assert (tmp_path / "plan.weights.npz").exists() == bool(changes or (int8 and int8.factors))
    found = load_plan(tmp_path / "plan.json")
    assert found.int8 == int8
    if int8 is not None and found.int8 is not None:
        for before, after in ((int8.factors, found.int8.factors), (int8.integers, found.int8.integers)):
            assert after.keys() == before.keys()
            for name, array in before.items():
                assert after[name].dtype == array.dtype
                np.testing.assert_array_equal(after[name], array)
    assert found == plan
    assert found.sha256 == plan.sha256
    assert found.changes.keys() == changes.keys()
    for key, array in changes.items():
        assert found.changes[key].dtype == array.dtype
        np.testing.assert_array_equal(found.changes[key], array)


def test_saving_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        make().save(tmp_path / name / "plan.json")
    for name in ("plan.json", "plan.weights.npz"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_json_is_for_people_too(tmp_path: Path) -> None:
    content = json.loads(make().save(tmp_path / "plan.json").read_text())
    assert content["schema"] == SCHEMA
    assert content["kept"]["layer.0.heads"] == [0, 2]
    assert content["refusals"][0]["code"] == "OP201"
    assert content["compensation_sha256"] == digest(make().arrays)
    assert "changes" not in content
    assert content["int8"] is None


def test_identity_covers_every_part_of_the_decision() -> None:
    assert make().sha256 == make().sha256
    swapped = {key: array[::-1] for key, array in CHANGES.items()}
    others = [
        make(kept={**make().kept, "layer.0.heads": (0, 3)}),
        make(changes=swapped),
        make(changes={}),
        make(rewrites=()),
        make(input_sha256="cd" * 32),
        make(recipe={"importance": "obs", "rounds": 4}),
        make(int8=STATIC),
        make(int8=dataclasses.replace(STATIC, ranges={**STATIC.ranges, "act": Range(0.0, 5.0)})),
        make(int8=STATIC.without(["/up:0"])),
        make(int8=DYNAMIC),
        make(int8=dataclasses.replace(DYNAMIC, integers={"/up:0": np.array([[1, -127], [3, 5]], np.int8)})),
        make(int8=dataclasses.replace(DYNAMIC, tables=())),
        make(int8=dataclasses.replace(DYNAMIC, factors={"/layer.0/norm:0": np.array([1.0, 2.0], np.float32)})),
    ]
    assert len({plan.sha256 for plan in [make(), *others]}) == len(others) + 1


def test_the_order_of_constants_does_not_matter() -> None:
    backwards = dict(reversed(CHANGES.items()))
    assert make(changes=backwards).sha256 == make().sha256
    assert digest(dict(reversed(make().arrays.items()))) == digest(make().arrays)
    assert digest({}) is None


def test_a_plan_does_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make().target = "macs=10%"  # type: ignore[misc]


def test_explain_has_a_line_for_each_site_and_refusal() -> None:
    first, *sites, refusal = make().explain().splitlines()
    assert first == "target macs=50%; passes heads, ffn; then residual-sum"
    assert [" ".join(line.split()) for line in sites] == [
        "layer.0.heads keeps 2 of 4 ##########",
        "layer.0.ffn keeps 0 of 8",
        "layer.1.ffn keeps 4 of 4 ####################",
    ]
    assert len({line.index("keeps") for line in sites}) == 1
    assert refusal == "OP201 layer.2.ffn: no; do something"
    assert "then nothing" in make(rewrites=()).explain()
    assert "\n2 products in int8: static activations, weights scaled per column\n" in make(int8=STATIC).explain()


def test_factors_that_were_changed_after_saving_are_refused(tmp_path: Path) -> None:
    path = make(int8=DYNAMIC).save(tmp_path / "plan.json")
    weights = dict(np.load(tmp_path / "plan.weights.npz"))
    weights["/layer.0/norm:0:factors"][0] += 1
    np.savez(tmp_path / "plan.weights.npz", **weights)
    with pytest.raises(InputError, match=r"does not hold the weights that plan\.json was saved with"):
        load_plan(path)


@pytest.mark.parametrize(
    "int8",
    [{}, 3, [], {"scheme": "dynamic", "per_channel": 1, "products": []}, {"scheme": "dynamic", "per_channel": True, "products": "x"}],
)
def test_an_int8_form_that_is_none_is_refused(int8: Any, tmp_path: Path) -> None:
    rewrite(make(int8=STATIC).save(tmp_path / "plan.json"), int8=int8)
    with pytest.raises(InputError):
        load_plan(tmp_path / "plan.json")


def test_removed_counts_units() -> None:
    assert make().removed == {"layer.0.heads": 2, "layer.0.ffn": 8, "layer.1.ffn": 0}


def rewrite(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps(content))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"plan not found: .*nothing\.json"):
        load_plan(tmp_path / "nothing.json")


@pytest.mark.parametrize("text", ["", "{", '{"schema": ', "\x00\xff", "[1, 2"])
def test_what_is_no_json_is_no_plan(text: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"plan\.json is not a plan"):
        load_plan(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("text", "found"),
    [('{"schema": "onnxprune.plan/99"}', "onnxprune.plan/99"), ('{"a": 1}', "None"), ("[]", "no object"), ("3", "no object")],
)
def test_another_schema_is_named(text: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(InputError, match=f"not a plan of schema {SCHEMA} .found {found}"):
        load_plan(tmp_path / "plan.json")


@pytest.mark.parametrize(
    "damage",
    [
        {"kept": None},
        {"kept": {"layer.0.heads": ["x"]}},
        {"kept": {"layer.0.heads": 3}},
        {"refusals": [{"code": "OP201"}]},
        {"refusals": [7]},
        {"passes": 3},
        {"surprise": 1},
    ],
    ids=str,
)
def test_damaged_content_is_refused(damage: dict[str, Any], tmp_path: Path) -> None:
    path = make().save(tmp_path / "plan.json")
    rewrite(path, **damage)
    with pytest.raises(InputError, match=r"plan\.json is damaged: "):
        load_plan(path)


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(Plan) if field.name not in ("changes", "bases", "streams")])
def test_a_missing_field_is_refused(field: str, tmp_path: Path) -> None:
    path = make().save(tmp_path / "plan.json")
    content = json.loads(path.read_text())
    del content[field]
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=rf"damaged: .*{field}"):
        load_plan(path)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    path = make().save(tmp_path / "plan.json")
    (tmp_path / "plan.weights.npz").unlink()
    with pytest.raises(InputError, match=r"plan\.weights\.npz is missing; copy it next to the plan"):
        load_plan(path)


def test_weights_of_another_run_are_refused(tmp_path: Path) -> None:
    path = make().save(tmp_path / "plan.json")
    other = {key: array + 1 for key, array in CHANGES.items()}
    make(changes=other).save(tmp_path / "other.json")
    (tmp_path / "other.weights.npz").replace(tmp_path / "plan.weights.npz")
    with pytest.raises(InputError, match=r"plan\.weights\.npz does not hold the weights that plan\.json was saved with"):
        load_plan(path)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut off"], ids=["empty", "text", "cut off"])
def test_weights_that_cannot_be_read_are_refused(content: bytes, tmp_path: Path) -> None:
    path = make().save(tmp_path / "plan.json")
    (tmp_path / "plan.weights.npz").write_bytes(content)
    with pytest.raises(InputError, match=r"plan\.weights\.npz"):
        load_plan(path)


def test_an_array_of_objects_is_not_unpickled(tmp_path: Path) -> None:
    path = make().save(tmp_path / "plan.json")
    np.savez(tmp_path / "plan.weights.npz", **{"node:1": np.array([{"a": 1}], object)})
    with pytest.raises(InputError, match="pickles can run code and are never loaded"):
        load_plan(path)


def test_weights_left_from_an_earlier_run_do_not_enter(tmp_path: Path) -> None:
    make().save(tmp_path / "plan.json")
    path = make(changes={}).save(tmp_path / "plan.json")
    assert load_plan(path).changes == {}


def test_a_place_that_cannot_be_written_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the plan to"):
        make().save(tmp_path / "file" / "plan.json")
