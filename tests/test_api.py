"""The public functions from Python: what they leave behind, what they refuse, and what they never do to their input."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import onnxprune
from onnxprune import api, proof
from onnxprune.api import PruneResult
from onnxprune.calibration.data import CalibrationData
from onnxprune.errors import GateError, InputError, TargetError
from onnxprune.graph.depth import with_depths
from onnxprune.graph.model import Model, load
from onnxprune.options import parse_share, settings
from onnxprune.passes.meter import Meter
from onnxprune.record import plain
from onnxprune.verification import Fidelity
from tests import zoo
from tests.passes.cases import BERT, GPT2, VIT, anatomy, arrays, brief_benchmarks, clockwork, easy_model

QUICK = {"target_macs": "60%", "rounds": 1, "compensation": "none", "importance": "magnitude", "bench_seconds": 0}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    target = tmp_path / "model.onnx"
    target.write_bytes(zoo.path(BERT).read_bytes())
    return target


@pytest.fixture
def calib(tmp_path: Path) -> Path:
    target = tmp_path / "rows.npz"
    np.savez(target, **arrays(BERT))  # type: ignore[arg-type]
    return target


# --- prune -------------------------------------------------------------------------------------------------------------------------


def test_prune_writes_the_model_and_leaves_the_input_as_it_was(model: Path, calib: Path, tmp_path: Path) -> None:
    before, rows = sha256(model), sha256(calib)
    result = onnxprune.prune(model, calib=calib, output=tmp_path / "small.onnx", **QUICK)
    assert (sha256(model), sha256(calib)) == (before, rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "rows.npz", "small.onnx"]
    assert result.output == tmp_path / "small.onnx"
    assert (tmp_path / "small.onnx").stat().st_size < model.stat().st_size
    session = onnxruntime.InferenceSession(str(result.output), providers=["CPUExecutionProvider"])
    assert np.isfinite(session.run(None, zoo.feeds(BERT))[0]).all()
    assert not result.already_met
    assert result.fidelity is not None
    assert result.fidelity.passed
    assert result.comparison is not None
    assert result.comparison.samples == 8
    assert result.benchmark is None


@pytest.mark.parametrize("name", [BERT, VIT, GPT2])
def test_a_model_may_be_a_path_bytes_or_a_model(name: str) -> None:
    path = zoo.path(name)
    rows = arrays(name)
    given = load(path)
    content = given.to_proto().SerializeToString(deterministic=True)
    results = [onnxprune.prune(source, calib=rows, **QUICK) for source in (path, str(path), path.read_bytes(), given)]
    assert len({json.dumps({site: list(units) for site, units in result.plan.kept.items()}) for result in results}) == 1
    assert given.to_proto().SerializeToString(deterministic=True) == content, "a Model that is given is not changed either"


def test_the_run_directory_holds_everything_there_is_to_know(model: Path, calib: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {**QUICK, "compensation": "refit", "importance": "fisher"}
    folder = tmp_path / "new" / "run"
    result = onnxprune.prune(model, calib=calib, run_dir=folder, command=["onnxprune", "model.onnx"], **options)
    assert sorted(path.name for path in folder.iterdir()) == ["costs.json", "plan.json", "plan.weights.npz", "report.html", "run.json"]
    record = json.loads((folder / "run.json").read_text())
    assert record == json.loads(json.dumps(result.record, default=plain))
    assert record["schema"] == "onnxprune.run/1"
    assert record["command"] == ["onnxprune", "model.onnx"]
    assert record["input"]["sha256"] == sha256(model)
    assert (record["calibration"]["rows"], record["calibration"]["held_back"], record["calibration"]["labels"]) == (24, 8, False)
    assert record["target"]["predicted"] <= record["target"]["goal"] == pytest.approx(0.6 * record["target"]["given"])
    assert record["verification"]["masked_equals_sliced"]["passed"] is True
    assert len(record["sites"]) == len(record["compensation"]) == 2 * zoo.LAYERS
    assert record["output"]["parameters"] < record["input"]["parameters"]
    assert record["seed"] == 0
    plan = onnxprune.load_plan(folder / "plan.json")
    assert plan.sha256 == record["plan_sha256"] == result.plan.sha256
    costs_file = json.loads((folder / "costs.json").read_text())
    assert set(costs_file["curves"]) == set(plan.units)
    page = (folder / "report.html").read_text()
    assert "layer.0" in page
    assert "<script" not in page


def test_without_a_run_directory_nothing_is_left(model: Path, calib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    onnxprune.prune(model, calib=calib, **QUICK)
    assert list(work.iterdir()) == []


def test_a_dry_run_decides_and_writes_no_model(model: Path, calib: Path, tmp_path: Path) -> None:
    # Which finishing rewrites are faster is asked of the clock, and may be answered differently the next time.
    options: dict[str, Any] = {**QUICK, "finishing": False}
    result = onnxprune.prune(model, calib=calib, output=tmp_path / "no" / "small.onnx", run_dir=tmp_path / "run", dry_run=True, **options)
    assert result.model is result.output is result.fidelity is None
    assert not (tmp_path / "no").exists()
    assert "verification" not in json.loads((tmp_path / "run" / "run.json").read_text())
    assert onnxprune.plan(model, calib=calib, **options).sha256 == result.plan.sha256


def test_a_target_that_is_met_writes_a_copy_only_when_asked(model: Path, calib: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {**QUICK, "target_macs": "100%"}
    result = onnxprune.prune(model, calib=calib, output=tmp_path / "small.onnx", **options)
    assert result.already_met
    assert result.model is None
    assert not (tmp_path / "small.onnx").exists()
    copied = onnxprune.prune(model, calib=calib, output=tmp_path / "small.onnx", write_unpruned=True, **options)
    assert copied.already_met
    assert copied.output == tmp_path / "small.onnx"
    assert copied.comparison is not None
    assert copied.comparison.loss[1] == 0


def test_runs_with_counted_targets_are_the_same_bytes(model: Path, calib: Path, tmp_path: Path) -> None:
    script = (
        "import sys, onnxprune\n"
        "onnxprune.prune(sys.argv[1], calib=sys.argv[2], output=sys.argv[3], target_macs='60%', rounds=2,\n"
        "  bench_seconds=0, finishing=False, run_dir=sys.argv[4])"
    )
    for number in (1, 2):
        options: dict[str, Any] = {"target_macs": "60%", "rounds": 2, "bench_seconds": 0, "finishing": False}
        onnxprune.prune(model, calib=calib, output=tmp_path / f"{number}.onnx", run_dir=tmp_path / f"run{number}", **options)
    words = [str(tmp_path / name) for name in ("model.onnx", "rows.npz", "3.onnx", "run3")]
    subprocess.run([sys.executable, "-c", script, *words], check=True, env={"PYTHONHASHSEED": "99", "OMP_NUM_THREADS": "1"})
    assert len({sha256(tmp_path / f"{number}.onnx") for number in (1, 2, 3)}) == 1
    for name in ("plan.json", "plan.weights.npz", "costs.json"):
        assert len({sha256(tmp_path / f"run{number}" / name) for number in (1, 2, 3)}) == 1, name


@pytest.mark.slow
def test_latency_is_measured_and_benchmarked(calib: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    brief_benchmarks(monkeypatch)
    told: list[str] = []
    result = onnxprune.prune(
        model,
        calib=calib,
        target_latency="50%",
        rounds=1,
        bench_seconds=0.3,
        input_shapes={"input_ids": (4, 40), "attention_mask": (4, 40), "token_type_ids": (4, 40)},
        progress=lambda what, done, total: told.append(what),
    )
    assert result.benchmark is not None
    assert list(result.benchmark.variants) == ["file as given", "finished original", "pruned"]
    assert result.benchmark.input_shapes["input_ids"] == (4, 40)
    assert result.record["target"]["unit"] == "ms"
    assert result.record["benchmark"]["variants"]["pruned"]["latency_ms"] > 0
    if not result.already_met:
        assert result.record["search"][0]["step"] == "anchor 0"
    assert {"cost table", "curvature", "re-fit", "verification", "benchmark"} <= set(told)


# --- gates -------------------------------------------------------------------------------------------------------------------------


def lossy(model: Path, calib: Path, tmp_path: Path, **more: Any) -> PruneResult:
    options: dict[str, Any] = {**QUICK, "target_macs": "10%", "max_drop": "1%"}
    return onnxprune.prune(model, calib=calib, output=tmp_path / "small.onnx", run_dir=tmp_path / "run", **options, **more)


def test_a_model_that_loses_too_much_is_not_written(model: Path, calib: Path, tmp_path: Path) -> None:
    with pytest.raises(
        GateError, match=r"1 - agreement is [\d.]+% on 8 held-back rows, more than the 1% allowed; no model was written"
    ) as caught:
        lossy(model, calib, tmp_path)
    assert not (tmp_path / "small.onnx").exists()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["gates"][0]["passed"] is False
    assert record["output"] is None
    assert caught.value.record is not None
    assert caught.value.record["plan_sha256"] == record["plan_sha256"]


def test_keep_best_writes_it_and_fails_all_the_same(model: Path, calib: Path, tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"small\.onnx was written because of --keep-best"):
        lossy(model, calib, tmp_path, keep_best=True)
    assert (tmp_path / "small.onnx").exists()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["output"]["sha256"] == sha256(tmp_path / "small.onnx")


def test_a_model_within_the_limit_passes_the_gate(tmp_path: Path) -> None:
    result = onnxprune.prune(
        easy_model(BERT), calib=arrays(BERT), max_drop="1%", **{**QUICK, "target_macs": "60%", "importance": "magnitude"}
    )
    assert result.record["gates"] == [{"name": "1 - agreement", "limit": 0.01, "value": 0.0, "passed": True, "samples": 8}]


def test_a_slice_that_is_not_its_mask_is_never_written(model: Path, calib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any) -> Fidelity:
        return Fidelity(0.5, 1.0, 8, 1e-4)

    monkeypatch.setattr(proof, "masked_equals_sliced", wrong)
    with pytest.raises(GateError, match="this is a defect of onnxprune: no model was written"):
        onnxprune.prune(model, calib=calib, output=tmp_path / "small.onnx", keep_best=True, **QUICK)
    assert not (tmp_path / "small.onnx").exists()


def test_an_output_is_written_whole_or_not_at_all(model: Path, calib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out" / "small.onnx"
    target.parent.mkdir()
    target.write_bytes(b"an older file")
    written = Path.write_bytes

    def full_disk(self: Path, content: bytes) -> int:
        written(self, content[: len(content) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full_disk)
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises((InputError, OSError), match="No space left on device"):
        onnxprune.prune(model, calib=calib, output=target, **QUICK)
    assert [path.name for path in target.parent.iterdir()] == ["small.onnx"]
    assert target.read_bytes() == b"an older file"


@pytest.mark.parametrize("limit", ["25%", "60%"])
def test_an_automatic_model_is_within_the_limit_or_not_written(limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clockwork(monkeypatch)
    target = tmp_path / "small.onnx"
    try:
        result = onnxprune.prune(zoo.path(BERT), calib=arrays(BERT, 64), output=target, max_drop=limit, bench_seconds=0)
    except GateError:
        assert not target.exists()
        return
    assert target.exists()
    assert result.comparison is not None
    assert result.comparison.samples == 8
    assert result.comparison.loss[1] <= parse_share(limit, "--max-drop")  # type: ignore[operator]


def test_a_latency_that_was_missed_is_not_written_unless_asked(
    model: Path, calib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clockwork(monkeypatch)
    monkeypatch.setattr(Meter, "measure", lambda *arguments: 4.5)
    options: dict[str, Any] = {**QUICK, "target_macs": None, "target_latency": "60%", "output": tmp_path / "small.onnx"}
    with pytest.raises(TargetError, match=r"target latency=60% was missed by 7\.1%: measured 4\.5, asked for 4\.2; no model was written"):
        onnxprune.prune(model, calib=calib, **options)
    assert not (tmp_path / "small.onnx").exists()
    with pytest.raises(TargetError, match="was written because of --keep-best"):
        onnxprune.prune(model, calib=calib, keep_best=True, **options)
    assert (tmp_path / "small.onnx").exists()


@pytest.mark.parametrize(("milliseconds", "written"), [(7.1, True), (7.3, False)])
def test_what_came_out_slower_than_the_file_as_given_is_not_written(
    model: Path, calib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, milliseconds: float, written: bool
) -> None:
    clockwork(monkeypatch)
    monkeypatch.setattr(Meter, "measure", lambda *arguments: milliseconds)
    options: dict[str, Any] = {**QUICK, "target_macs": None, "max_drop": "90%", "output": tmp_path / "small.onnx"}
    if written:
        onnxprune.prune(model, calib=calib, **options)
    else:
        with pytest.raises(TargetError, match=r"slower than the file as given: 7\.3 ms instead of 7 ms; no model was written"):
            onnxprune.prune(model, calib=calib, **options)
    assert (tmp_path / "small.onnx").exists() == written


def test_a_file_that_does_not_compute_what_was_verified_is_removed(
    model: Path, calib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Model.save

    def damaged(self: Model, path: Any, *arguments: Any) -> Path:
        return real(load(zoo.path(BERT)), path)

    monkeypatch.setattr(Model, "save", damaged)
    with pytest.raises(GateError, match="does not compute what was verified"):
        onnxprune.prune(model, calib=calib, output=tmp_path / "small.onnx", **QUICK)
    assert not (tmp_path / "small.onnx").exists()


def test_random_rows_judge_nothing(model: Path) -> None:
    for options in ({}, {"target_macs": "50%", "max_drop": "5%"}):
        with pytest.raises(InputError, match="--calib random cannot judge accuracy"):
            onnxprune.prune(model, calib="random", **options)
    assert onnxprune.prune(model, calib="random", **QUICK).model is not None


# --- what is refused ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_macs": "50%", "target_latency": "5ms"}, "give one target, not 2: latency=5 ms, macs=50%"),
        ({"target_macs": "fast"}, "cannot read 'fast'"),
        ({"importance": "fischer"}, "unknown importance 'fischer'; known: kfac, fisher, block-fisher, cap, taylor"),
        ({"compensation": "all"}, "unknown compensation 'all'; known: refit, scale, none"),
        ({"samples": 7}, "--samples 7 is too small; at least 8"),
        ({"rounds": 0}, "--rounds 0 is too small; at least 1"),
        ({"threads": -1}, "--threads -1 is too small; at least 0"),
        ({"max_drop": "a bit"}, "--max-drop 'a bit' is not a share"),
        ({"max_drop": 1.5}, r"--max-drop 1\.5 is out of range"),
    ],
    ids=str,
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        settings(**options)


@pytest.mark.parametrize(("given", "share"), [("1%", 0.01), (0.01, 0.01), ("0.5", 0.5), (" 2.5% ", 0.025), (0, 0.0), (None, None)])
def test_shares_are_per_cent_or_numbers(given: Any, share: float | None) -> None:
    assert parse_share(given, "--max-drop") == (share if share is None else pytest.approx(share))


@pytest.mark.parametrize("given", ["nan", "inf", "-1%", "100%", "", "%"])
def test_what_is_no_share_is_refused(given: str) -> None:
    with pytest.raises(InputError, match="--max-drop"):
        parse_share(given, "--max-drop")


def test_passes_may_be_one_string_or_a_list() -> None:
    assert settings("heads,ffn").passes == settings(["heads", "ffn"]).passes == settings(("heads", "ffn")).passes


def test_without_any_target_the_loss_decides() -> None:
    assert settings().target.auto
    assert str(settings().target) == "latency=auto"


def test_an_option_that_does_not_exist_is_a_type_error(model: Path, calib: Path) -> None:
    with pytest.raises(TypeError, match="target_speed"):
        onnxprune.prune(model, calib=calib, target_speed="fast")


def test_calibration_beside_the_model_is_found(model: Path, calib: Path) -> None:
    calib.rename(model.with_name("model.calib.npz"))
    assert onnxprune.prune(model, dry_run=True, **QUICK).record["calibration"]["rows"] == 24


def test_no_calibration_says_how_to_make_one(model: Path) -> None:
    with pytest.raises(InputError, match=r"no calibration data: --calib was not given and .*model\.calib\.npz does not exist.*np\.savez"):
        onnxprune.prune(model, **QUICK)
    with pytest.raises(InputError, match=r"--calib was not given\. Save"):
        onnxprune.prune(load(model), **QUICK)


def test_the_input_is_never_the_output(model: Path, calib: Path, tmp_path: Path) -> None:
    before = sha256(model)
    (tmp_path / "link.onnx").symlink_to(model)
    plan = onnxprune.plan(model, calib=calib, **QUICK)
    for output in (model, tmp_path / "link.onnx", tmp_path / "." / "model.onnx"):
        with pytest.raises(InputError, match="onnxprune never overwrites its input"):
            onnxprune.prune(model, calib=calib, output=output, **QUICK)
        with pytest.raises(InputError, match="onnxprune never overwrites its input"):
            onnxprune.apply(model, plan, output=output)
    assert sha256(model) == before


def test_places_that_cannot_be_written_are_refused_before_the_work_starts(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("the work has started")

    monkeypatch.setattr(api, "load_calibration", never)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a directory; name a file in it"):
        onnxprune.prune(model, calib="x", output=tmp_path, **QUICK)
    with pytest.raises(InputError, match="the directory of the output does not exist"):
        onnxprune.prune(model, calib="x", output=tmp_path / "no" / "small.onnx", **QUICK)
    for folder in ("file", "file/run"):
        with pytest.raises(InputError, match=r"the run directory .* cannot be made: .*file is a file"):
            onnxprune.prune(model, calib="x", run_dir=tmp_path / folder, **QUICK)


def test_an_impossible_target_leaves_nothing(model: Path, calib: Path, tmp_path: Path) -> None:
    with pytest.raises(TargetError):
        onnxprune.prune(model, calib=calib, output=tmp_path / "small.onnx", run_dir=tmp_path / "run", **{**QUICK, "target_macs": "0.1%"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "rows.npz"]


# --- the other functions -----------------------------------------------------------------------------------------------------------


def test_apply_replays_a_plan_from_a_file_or_from_memory(model: Path, calib: Path, tmp_path: Path) -> None:
    result = onnxprune.prune(model, calib=calib, output=tmp_path / "small.onnx", run_dir=tmp_path / "run", **QUICK)
    onnxprune.apply(model, result.plan, output=tmp_path / "a.onnx")
    onnxprune.apply(model, tmp_path / "run" / "plan.json", output=tmp_path / "b.onnx")
    assert sha256(tmp_path / "a.onnx") == sha256(tmp_path / "b.onnx") == sha256(tmp_path / "small.onnx")
    assert isinstance(onnxprune.apply(model, result.plan), Model)


@pytest.mark.parametrize("name", [BERT, VIT])
def test_inspect_says_what_can_go_and_what_it_weighs(name: str) -> None:
    found = json.loads(json.dumps(onnxprune.inspect(zoo.path(name))))
    sites = with_depths(anatomy(name)).sites
    assert [(site["site"], site["units"]) for site in found["sites"]] == [(site.name, site.units) for site in sites]
    inside = [site for site in found["sites"] if site["kind"] in ("qk", "vo")]
    apart = [site for site in found["sites"] if site not in inside]
    assert 0.5 < sum(site["macs_share"] for site in apart) < 1
    assert sum(site["parameters"] for site in apart) < found["model"]["parameters"]
    heads = sum(site["macs"] for site in apart if site["kind"] == "heads")
    assert sum(site["macs"] for site in inside) == heads, "what lies inside heads is what heads weigh"
    assert found["model"]["sha256"] == sha256(zoo.path(name))
    assert {refusal["code"][:2] for refusal in found["refusals"]} <= {"OP"}


def test_inspect_says_whether_tokens_can_leave() -> None:
    assert onnxprune.inspect(zoo.path(VIT))["tokens"] == {"places": zoo.LAYERS - 1, "count": 17, "leading": 1}
    assert onnxprune.inspect(zoo.path(BERT))["tokens"] == {"places": zoo.LAYERS - 1, "count": None, "leading": 1}
    assert onnxprune.inspect(zoo.path(GPT2))["tokens"]["refusal"]["code"] == "OP703"


def test_inspect_lists_sites_of_a_model_whose_tokens_cannot_be_studied(monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(model: Model) -> None:
        raise InputError("cannot spell out its attention")

    monkeypatch.setattr(api, "study_tokens", cannot)
    found = onnxprune.inspect(zoo.path(BERT))
    assert found["sites"]
    assert found["tokens"]["refusal"]["reason"] == "cannot spell out its attention"


def test_inspect_counts_for_the_shape_asked_for() -> None:
    shapes = {name: (1, 16) for name in ("input_ids", "attention_mask", "token_type_ids")}
    found = onnxprune.inspect(zoo.path(BERT), input_shapes=shapes)
    assert found["inputs"] == {name: [1, 16] for name in shapes}
    assert found["macs"] < onnxprune.inspect(zoo.path(BERT))["macs"]


def test_verify_compares_on_all_rows_and_has_a_gate(model: Path, calib: Path, tmp_path: Path) -> None:
    onnxprune.prune(model, calib=calib, output=tmp_path / "small.onnx", **{**QUICK, "target_macs": "10%"})
    result = onnxprune.verify(model, tmp_path / "small.onnx", calib=calib)
    assert result.samples == 32
    assert result.agreement is not None
    assert result.agreement.value < 1
    assert onnxprune.verify(model, model, calib=calib, max_drop=0).loss == ("1 - agreement", 0)
    with pytest.raises(GateError, match=r"1 - agreement is [\d.]+%, more than the 0\.1% allowed"):
        onnxprune.verify(model, tmp_path / "small.onnx", calib=calib, max_drop="0.1%")
    assert onnxprune.verify(model, tmp_path / "small.onnx", calib=calib, samples=10).samples == 10


def test_verify_refuses_a_model_of_other_outputs(model: Path, calib: Path) -> None:
    with pytest.raises(InputError, match="the second model has no output 'logits'; it has last_hidden_state"):
        onnxprune.verify(model, zoo.path("minilm-sdpa-do18"), calib=calib)


def test_bench_takes_rows_or_makes_a_request_up(model: Path, calib: Path) -> None:
    made_up = onnxprune.bench([model, model], seconds=0.2)
    assert list(made_up.variants) == [str(model), f"{model} (again)"]
    assert made_up.input_shapes["input_ids"][0] == 1
    rows = onnxprune.bench(
        [load(model)], calib=calib, seconds=0.2, input_shapes={"input_ids": (3, 12), "attention_mask": (3, 12), "token_type_ids": (3, 12)}
    )
    assert list(rows.variants) == ["model 0"]
    assert rows.input_shapes["input_ids"] == (3, 12)
    with pytest.raises(InputError, match="at least one model"):
        onnxprune.bench([])


def test_rows_may_be_loaded_already(model: Path) -> None:
    data = CalibrationData(arrays(BERT), None, "made here")
    assert onnxprune.prune(model, calib=data, dry_run=True, **QUICK).record["calibration"]["origin"] == "made here"


# --- imports -----------------------------------------------------------------------------------------------------------------------


@cache
def modules_after(code: str) -> frozenset[str]:
    script = f"import sys\n{code}\nprint('\\n'.join(sorted(name.split('.')[0] for name in sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1"})
    return frozenset(done.stdout.split())


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = {"onnx", "numpy", "onnxruntime", "scipy", "onnx_graphsurgeon", "onnxscript", "torch", "transformers", "click", "rich", "jinja2"}
    assert not modules_after("import onnxprune") & heavy
    assert not modules_after("import onnxprune.cli") & (heavy - {"click"})


def test_a_run_needs_no_training_framework(model: Path, calib: Path) -> None:
    code = f"import onnxprune; onnxprune.prune({str(model)!r}, calib={str(calib)!r}, target_macs='60%', rounds=1, bench_seconds=0)"
    loaded = modules_after(code)
    assert {"onnx", "numpy", "onnxruntime"} <= loaded
    assert not loaded & {"torch", "transformers", "tensorflow", "jax", "sklearn", "pandas"}


def test_public_names_are_there_and_others_are_not() -> None:
    for name in onnxprune.__all__:
        assert getattr(onnxprune, name) is not None
    with pytest.raises(AttributeError, match="module 'onnxprune' has no attribute 'pruen'"):
        _ = onnxprune.pruen  # type: ignore[attr-defined]
