"""``onnxprune export`` as it is typed, and a core that does without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from onnxprune.cli.export import TASKS as LISTED
from onnxprune.export.tasks import AUTO, TASKS
from tests.cli.cases import run
from tests.export import folders

Folder = Callable[[str], Path]


def test_the_command_knows_every_task() -> None:
    assert list(LISTED) == [AUTO, *TASKS]


def test_a_model_and_its_data_are_written_and_told(model: Folder, tmp_path: Path) -> None:
    data = folders.write_csv(tmp_path / "train.csv")
    out = tmp_path / "m.onnx"
    words = ["--exporter", "torchscript", "--calib-from", data, "--label-column", "mood", "--samples", "40"]
    result = run("export", model("classifier"), "-o", out, *words, "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert (record["schema"], record["task"], record["output"]) == ("onnxprune.export/1", "sequence-classification", str(out))
    assert record["calibration"] == str(tmp_path / "m.calib.npz")
    with np.load(record["calibration"]) as found:
        assert {name: list(found[name].shape) for name in found.files} == record["calibration_shapes"]
        assert len(found["labels"]) == 40
    assert "largest difference to torch" in result.stderr
    assert "taken" in result.stderr


def test_without_a_name_the_file_stands_beside_the_folder(model: Folder, tmp_path: Path) -> None:
    assert run("export", model("vit"), "--exporter", "torchscript", "-q").exit_code == 0
    assert (tmp_path / "my-vit.onnx").is_file()
    assert not (tmp_path / "my-vit.calib.npz").exists()


def test_errors_have_their_exit_codes(model: Folder, tmp_path: Path) -> None:
    folder = model("classifier")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    result = run("export", folder)
    assert result.exit_code == 2
    assert "save_pretrained" in result.stderr
    assert run("export", tmp_path / "nothing").exit_code == 2
    assert run("export", folder, "--task", "poetry").exit_code == 2


def test_without_the_extra_the_way_out_is_named(model: Folder) -> None:
    code = (
        "import sys\nsys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from onnxprune.cli import main\nmain(['export', sys.argv[1]])"
    )
    result = subprocess.run([sys.executable, "-c", code, str(model("classifier"))], capture_output=True, text=True)
    assert result.returncode == 2
    assert "export needs torch, transformers, which are not installed; run: pip install 'onnxprune[export]'" in result.stderr


@pytest.mark.parametrize("statement", ["import onnxprune.api", "import onnxprune; onnxprune.export_model", "import onnxprune.cli"])
def test_torch_is_imported_by_an_export_only(statement: str) -> None:
    code = f"import sys\n{statement}\nprint([name for name in ('torch', 'transformers', 'PIL') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_help_of_the_command_needs_nothing_heavy() -> None:
    code = (
        "import sys\nfrom onnxprune.cli import main\n"
        "try:\n    main(['export', '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "print([name for name in ('numpy', 'onnx', 'rich', 'torch') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.endswith("[]\n")
