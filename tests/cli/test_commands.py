"""The commands as they are typed, and what each of them leaves."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import onnx
import onnxruntime
import pytest

import onnxprune
from onnxprune.cli import main
from onnxprune.options import PRESETS, settings
from tests import zoo
from tests.cli.cases import QUICK, contents, fill, run
from tests.passes.cases import BERT, brief_benchmarks


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    fill(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parsed(*words: str) -> click.Context:
    """What the command line understands, without running it."""
    name, *rest = main._with_command(list(words))
    return main.commands[name].make_context(name, rest)


# --- help and the way words are read -----------------------------------------------------------------------------------------------


def test_help_lists_every_command_and_real_examples() -> None:
    result = run("--help")
    assert result.exit_code == 0
    for name in main.commands:
        assert re.search(rf"^  {name}\b", result.stdout, re.MULTILINE), name
    assert "onnxprune model.onnx --passes heads,ffn --target-latency 5ms --calib data.npz -o small.onnx" in result.stdout


@pytest.mark.parametrize("name", main.commands)
def test_every_command_teaches_by_examples_that_parse(name: str) -> None:
    page = run(name, "--help").stdout
    examples = [line.partition("#")[0].split() for line in page.partition("Examples:")[2].splitlines() if line.strip()]
    assert examples
    for program, *words in examples:
        assert program == "onnxprune"
        parsed(*[word.strip("'") for word in words if word != ">" and word != "run.json"])


@pytest.mark.parametrize("name", main.commands)
def test_every_option_says_what_it_does(name: str) -> None:
    assert [param.name for param in main.commands[name].params if isinstance(param, click.Option) and not param.help] == []


def test_help_and_version_import_nothing_heavy() -> None:
    code = (
        "import sys\nfrom onnxprune.cli import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "print([name for name in ('numpy', 'onnx', 'onnxruntime', 'rich', 'jinja2', 'scipy') if name in sys.modules])"
    )
    for words in (["--help"], ["prune", "--help"], ["--version"]):
        output = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True).stdout
        assert output.splitlines()[-1] == "[]", words


def test_the_version_is_that_of_the_package() -> None:
    assert run("--version").stdout.strip() == f"onnxprune {onnxprune.__version__}"


def test_a_first_word_that_is_no_command_is_a_model() -> None:
    context = parsed("model.onnx", "--passes", "heads,ffn", "--target-latency", "5ms", "--calib", "data.npz", "-o", "small.onnx")
    assert context.command.name == "prune"
    assert (context.params["model"], context.params["out"]) == (Path("model.onnx"), Path("small.onnx"))
    assert context.params["target_latency"] == "5ms"


@pytest.mark.parametrize(
    "words",
    [
        ("model.onnx", "--passes", "heads,ffn", "--target-latency"),
        ("model.onnx", "--target-latency", "--calib", "data.npz"),
        ("model.onnx", "--target-latency", "-o", "small.onnx"),
        ("--target-latency", "auto", "model.onnx"),
    ],
)
def test_a_target_latency_without_a_value_means_auto(words: tuple[str, ...]) -> None:
    params = parsed(*words).params
    assert params["target_latency"] == "auto"
    assert params["model"] == Path("model.onnx")


def test_without_a_target_there_is_none() -> None:
    assert parsed("model.onnx").params["target_latency"] is None


def test_a_command_that_is_misspelt_is_suggested(folder: Path) -> None:
    result = run("inspekt", "model.onnx")
    assert result.exit_code == 2
    assert "did you mean 'onnxprune inspect'?" in result.stderr


def test_a_model_may_be_named_almost_like_a_command(folder: Path) -> None:
    (folder / "model.onnx").rename("plans")
    assert run("plans", "--calib", "data.npz", *QUICK, "-q").exit_code == 0
    assert (folder / "plans.pruned.onnx").exists()


def test_shapes_and_choices_reach_the_library() -> None:
    params = parsed("m.onnx", "--input-shape", "a:1x128", "--input-shape", "b::c:4", "--external-data", "never", "--no-finishing").params
    assert params["input_shapes"] == (("a", (1, 128)), ("b::c", (4,)))
    assert (params["external_data"], params["finishing"]) == (False, False)
    assert parsed("m.onnx").params["finishing"] is True


def test_how_int8_is_done_and_presets_reach_the_library() -> None:
    params = parsed("m.onnx", "--preset", "fastformers", "--int8", "static").params
    assert (params["preset"], params["passes"], params["int8"]) == ("fastformers", None, "static")
    assert parsed("plan", "m.onnx").params["int8"] == "auto"
    preset = next(param for param in main.commands["prune"].params if param.name == "preset")
    assert isinstance(preset.type, click.Choice)
    assert tuple(preset.type.choices) == tuple(PRESETS)


def test_a_preset_sets_passes_and_equal_layers() -> None:
    chosen = settings(preset="fastformers", int8="dynamic")
    assert chosen.passes == ("heads", "ffn", "int8")
    assert chosen.recipe.uniform
    assert not settings().recipe.uniform
    assert settings(passes="ffn, int8").passes == ("ffn", "int8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--preset", "fastformers", "--passes", "heads,ffn"), "stands for --passes heads,ffn,int8 with equal layers; give one of the two"),
        (("--int8", "static"), "int8 is not among the passes; add it: --passes heads,ffn,int8"),
        (("--preset", "fastformer"), "'fastformer' is not 'fastformers'"),
    ],
)
def test_options_that_contradict_each_other_are_refused(folder: Path, words: tuple[str, ...], message: str) -> None:
    result = run("model.onnx", "--calib", "data.npz", *words)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


# --- prune -------------------------------------------------------------------------------------------------------------------------


def test_prune_writes_model_and_run_directory_beside_the_input(folder: Path) -> None:
    result = run("model.onnx", "--calib", "data.npz", *QUICK)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    files = set(contents(folder))
    assert {"model.pruned.onnx", "model.pruned.run/run.json", "model.pruned.run/plan.json", "model.pruned.run/report.html"} <= files
    for word in ("model.pruned.onnx", "model.pruned.run/report.html", "layer.0.ffn", "same prediction"):
        assert word in result.stderr
    onnxruntime.InferenceSession("model.pruned.onnx", providers=["CPUExecutionProvider"])


def test_no_line_is_wider_than_the_page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    brief_benchmarks(monkeypatch)
    result = run("model.onnx", "--calib", "data.npz", *QUICK[:-1])
    assert result.exit_code == 0, result.stderr
    assert max(len(line) for line in result.stderr.splitlines() if not line.startswith("warning:")) <= 100
    assert re.search(r"^ pruned +[\d.]+ m?s +[\d.]+x \[", result.stderr, re.MULTILINE)


def test_json_goes_to_stdout_and_words_to_stderr(folder: Path) -> None:
    result = run("model.onnx", "--calib", "data.npz", *QUICK, "--json")
    record = json.loads(result.stdout)
    assert record["schema"] == "onnxprune.run/1"
    assert record["output"]["path"] == "model.pruned.onnx"
    assert Path(record["run_dir"], "plan.json").exists()
    assert "Kept" in result.stderr


def test_quiet_says_nothing(folder: Path) -> None:
    result = run("model.onnx", "--calib", "data.npz", *QUICK, "-q")
    assert (result.exit_code, result.output) == (0, "")


def test_a_dry_run_writes_everything_but_the_model(folder: Path) -> None:
    result = run("model.onnx", "--calib", "data.npz", *QUICK, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "Plan only" in result.stderr
    assert not (folder / "model.pruned.onnx").exists()
    assert (folder / "model.pruned.run" / "plan.json").exists()


def test_keep_leaves_sites_whole(folder: Path) -> None:
    result = run("model.onnx", "--calib", "data.npz", *QUICK, "--keep", r"layer\.0\.", "--json")
    assert {site["site"].split(".")[1] for site in json.loads(result.stdout)["sites"]} == {"1", "2"}


def test_the_package_log_is_given_back(folder: Path) -> None:
    import logging

    log = logging.getLogger("onnxprune")
    before = list(log.handlers), log.propagate, log.level
    run("model.onnx", "--calib", "data.npz", *QUICK, "-v")
    assert (list(log.handlers), log.propagate, log.level) == before


# --- the other commands ------------------------------------------------------------------------------------------------------------


def test_plan_then_apply_gives_the_bytes_of_prune(folder: Path) -> None:
    words = ("model.onnx", "--calib", "data.npz", *QUICK[:-1])
    assert run(*words, "--no-bench", "-o", "once.onnx", "-q").exit_code == 0
    planned = run("plan", *words, "-o", "plan.json")
    assert planned.exit_code == 0, planned.stderr
    assert "plan.json" in planned.stderr
    applied = run("apply", "model.onnx", "plan.json", "-o", "twice.onnx", "--json")
    assert applied.exit_code == 0, applied.stderr
    assert json.loads(applied.stdout)["output"] == "twice.onnx"
    assert Path("once.onnx").read_bytes() == Path("twice.onnx").read_bytes()


def test_a_plan_of_another_file_is_refused(folder: Path) -> None:
    run("plan", "model.onnx", "--calib", "data.npz", *QUICK[:-1], "-o", "plan.json", "-q")
    content = json.loads(Path("plan.json").read_text())
    Path("plan.json").write_text(json.dumps({**content, "input_sha256": "0" * 64}))
    result = run("apply", "model.onnx", "plan.json", "-o", "out.onnx")
    assert result.exit_code == 2
    assert "made for another file" in result.stderr
    assert not Path("out.onnx").exists()


def test_inspect_lists_sites_for_people_and_programs(folder: Path) -> None:
    text, content = run("inspect", "model.onnx"), json.loads(run("inspect", "model.onnx", "--json").stdout)
    assert text.exit_code == 0
    assert "4 heads" in text.stdout
    assert "can leave behind 2 attentions" in text.stdout
    assert {site["kind"] for site in content["sites"]} == {"heads", "ffn", "qk", "vo"}
    assert all(site["site"] in text.stdout for site in content["sites"])


def test_inspect_why_shows_only_what_matches(folder: Path) -> None:
    found = run("inspect", "model.onnx", "--why", "layer.1").stdout
    assert "layer.1.heads" in found
    assert "layer.0" not in found
    assert "of all" in found
    assert "no code, site, node or tensor of this model holds 'elephant'" in run("inspect", "model.onnx", "--why", "elephant").stdout
    answers = json.loads(run("inspect", "model.onnx", "--why", "OP201", "--json").stdout)["why"]
    assert [(answer["about"], answer["name"]) for answer in answers] == [("code", "OP201")]


def test_verify_compares_and_can_fail(folder: Path) -> None:
    run("model.onnx", "--calib", "data.npz", *QUICK, "--target-macs", "20%", "-q")
    words = ("verify", "model.onnx", "model.pruned.onnx", "--calib", "data.npz")
    assert "same prediction" in run(*words).stdout
    assert json.loads(run(*words, "--json").stdout)["schema"] == "onnxprune.verify/1"
    failed = run(*words, "--max-drop", "0%")
    assert failed.exit_code == 4
    assert "same prediction" in failed.output


def test_bench_compares_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    brief_benchmarks(monkeypatch)
    result = run("bench", "model.onnx", "model.onnx", "--seconds", "1", "--json")
    assert result.exit_code == 0, result.stderr
    assert list(json.loads(result.stdout)["variants"]) == ["model.onnx", "model.onnx (again)"]
    assert "speed-up" in run("bench", "model.onnx", "--calib", "data.npz", "--seconds", "1").stdout


def test_bench_compares_outputs_when_there_is_real_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    brief_benchmarks(monkeypatch)
    run("model.onnx", "--calib", "data.npz", *QUICK, "--target-macs", "30%", "-o", "small.onnx", "-q")
    words = ("bench", "model.onnx", "small.onnx", "--seconds", "1", "--calib")
    table = run(*words, "data.npz").stdout
    assert re.search(r"file +params +MACs +agreement +KL", table)
    assert "quality against the first model on 32 samples" in table
    first, second = json.loads(run(*words, "data.npz", "--json").stdout)["variants"].values()
    assert "quality" not in first
    verified = json.loads(run("verify", "model.onnx", "small.onnx", "--calib", "data.npz", "--json").stdout)
    assert {key: second["quality"][key] for key in ("agreement", "kl")} == {key: verified[key] for key in ("agreement", "kl")}
    assert second["quality"]["kl"]["value"] > 0
    blind = run(*words, "random")
    assert "KL" not in blind.stdout
    assert "memory" in blind.stdout


def test_bench_refuses_models_of_other_inputs_or_outputs(folder: Path) -> None:
    (folder / "text.onnx").write_bytes(zoo.path(BERT).read_bytes())
    proto = onnx.load("model.onnx")
    maker = next(node for node in proto.graph.node if proto.graph.output[0].name in node.output)
    maker.output[list(maker.output).index(proto.graph.output[0].name)] = proto.graph.output[0].name = "scores"
    onnx.save(proto, "renamed.onnx")
    for other, message in (
        ("text.onnx", "variant 'text.onnx' wants input 'input_ids'; the benchmark inputs are pixel_values"),
        ("renamed.onnx", "variant 'renamed.onnx' has no output 'logits' to compare; it has scores"),
    ):
        result = run("bench", "model.onnx", other, "--calib", "data.npz")
        assert result.exit_code == 2
        assert message in " ".join(result.stderr.split())


def test_bench_of_models_whose_output_says_nothing_warns_and_times(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    brief_benchmarks(monkeypatch)
    node = onnx.helper.make_node("ReduceMean", ["pixel_values"], ["y"], keepdims=0, noop_with_empty_axes=0)
    shapes = {"pixel_values": ["n", *np.load("data.npz")["pixel_values"].shape[1:]], "y": []}
    ends = {name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    graph = onnx.helper.make_graph([node], "mean", [ends["pixel_values"]], [ends["y"]])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9), "mean.onnx")
    result = run("bench", "mean.onnx", "mean.onnx", "--calib", "data.npz", "--seconds", "1")
    assert result.exit_code == 0, result.stderr
    assert "quality is not compared: mean.onnx" in result.stderr
    assert "speed-up" in result.stdout


def test_passes_are_listed_and_explained() -> None:
    assert {item["name"] for item in json.loads(run("passes", "--json").stdout)} >= {"heads", "ffn", "residual-sum"}
    assert "query, key and value" in run("passes", "heads").stdout
    assert "did you mean 'heads'?" in run("passes", "head").stderr


def test_passes_say_whether_the_numbers_stay_and_what_every_run_tries() -> None:
    known = {item["name"]: item for item in json.loads(run("passes", "--json").stdout)}
    assert {name: item["kind"] for name, item in known.items() if name in ("heads", "int8", "fp16", "fuse-attention")} == {
        "heads": "removes units",
        "int8": "other numbers",
        "fp16": "other numbers",
        "fuse-attention": "same numbers",
    }
    assert known["residual-sum"]["tried"] == ["cpu"]
    assert known["int4"]["tried"] == []
    assert "in every run on cpu, cuda" in run("passes", "fuse-attention").stdout


def test_doctor_starts_the_cpu_provider() -> None:
    result = run("doctor", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["providers"]["CPUExecutionProvider"] == "ok"
    assert "CPUExecutionProvider" in run("doctor").stdout


def test_report_is_rendered_again(folder: Path) -> None:
    run("model.onnx", "--calib", "data.npz", *QUICK, "-q")
    page = folder / "model.pruned.run" / "report.html"
    before = page.read_text()
    page.unlink()
    assert run("report", "model.pruned.run").exit_code == 0
    assert page.read_text() == before
    assert json.loads(run("report", "model.pruned.run", "-o", "team.html", "--json").stdout) == {"report": "team.html"}
    assert (folder / "team.html").read_text() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "is not a run directory"), ("{", "is not readable JSON"), ("[]", "no JSON object"), ("{}", "schema None")],
)
def test_a_folder_without_a_record_has_no_report(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    result = run("report", tmp_path)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "report.html").exists()


def test_the_module_runs_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "onnxprune", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("onnxprune ")
