"""Reading WordNet and drawing even classes, on a file of a few lines."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from benchmarks.tasks import ROOT

DATA_NOUN = """\
  1 This software and database is being provided to you, the LICENSEE
00001740 03 n 01 entity 0 001 ~ 00001930 n 0000 | that which is perceived
02084071 05 n 03 dog 0 domestic_dog 0 Canis_familiaris 0 001 @ 02083346 n 0000 | a member of the genus Canis; "the dog barked all night"
00745431 04 n 01 service 0 001 @ 00575741 n 0000 | work done by one person or group
09762509 18 n 02 aide 0 auxiliary 0 001 @ 09815790 n 0000 | someone who acts as assistant
"""


@pytest.fixture(scope="module")
def make_model() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_model", ROOT / "samples" / "text_classifier" / "make_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_glosses_join_words_with_the_definition_and_drop_examples_and_small_classes(make_model: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "data.noun").write_text(DATA_NOUN, "latin-1")
    texts, labels = make_model.glosses(tmp_path)
    assert texts == [
        "dog, domestic dog, Canis familiaris : a member of the genus Canis",
        "service : work done by one person or group",
        "aide, auxiliary : someone who acts as assistant",
    ]
    assert [make_model.CLASSES[label] for label in labels] == ["animal", "act", "person"]


def test_class_names_and_file_numbers_pair_up(make_model: ModuleType) -> None:
    numbers = dict(zip(make_model.CLASSES, make_model.LEXICOGRAPHER_FILES, strict=True))
    assert (numbers["act"], numbers["object"], numbers["plant"], numbers["time"]) == (4, 17, 20, 28)


def test_balanced_takes_small_classes_whole_and_caps_large_ones_alike(make_model: ModuleType) -> None:
    labels = np.repeat([0, 1, 2], [5, 100, 300])
    rows = make_model.balanced(labels, 65, np.random.default_rng(0))
    assert np.bincount(labels[rows]).tolist() == [5, 30, 30]
    assert len(set(rows.tolist())) == 65
