"""Sample rows with the tokens that leave them."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path

import numpy as np
import pytest

import onnxprune
from onnxprune.calibration.data import CalibrationData
from onnxprune.calibration.tokenizer import read_words
from onnxprune.errors import InputError
from onnxprune.graph.token_cut import cut_tokens
from onnxprune.passes.token_samples import _picture, _text, grid_of, png, stays
from onnxprune.runtime.session import RuntimeOptions
from tests.architectures import exports
from tests.graph.test_tokens import plan_of, prepared


def test_a_padded_row_tells_of_its_own_words_only() -> None:
    """Alone, a row of five real tokens keeps what it keeps beside a longer one."""
    model, _, axis = prepared("bert", "do18-sdpa")
    plan = plan_of(axis, 0.7)
    ids = np.array([[3, 9, 8, 7, 4, 0, 0], [3, 5, 6, 7, 8, 9, 4]])
    mask = (ids > 0).astype(np.int64)
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    traced = cut_tokens(model, plan, traced=True)
    for axes in ({}, dict.fromkeys(inputs, 1)):
        data = CalibrationData(inputs, None, "rows", mask > 0, axes)
        (feeds, short), (_, long) = stays(traced, data, len(plan.cuts), RuntimeOptions())
        assert len(short) == (5 if axes else 7) == feeds["input_ids"].shape[1]
        assert short[5:].tolist() == ([] if axes else [-1, -1])
        assert short[0] == long[0] == len(plan.cuts)
        assert (short == len(plan.cuts)).sum() == 1 + 3
        assert (long == len(plan.cuts)).sum() == 1 + 5


@pytest.mark.parametrize(
    ("size", "tokens", "grid"),
    [
        ((224, 224), 197, (14, 14, 1)),
        ((224, 224), 196, (14, 14, 0)),
        ((224, 224), 201, (14, 14, 5)),
        ((128, 256), 129, (8, 16, 1)),
        ((224, 224), 12, (3, 3, 3)),
        ((10, 1000), 3, None),
    ],
)
def test_tokens_are_a_grid_of_square_patches_behind_some_others(
    size: tuple[int, int], tokens: int, grid: tuple[int, int, int] | None
) -> None:
    assert grid_of(*size, tokens) == grid


def pixels_of(content: bytes, height: int, channels: int) -> np.ndarray:
    """Pixels [H, W, C] of a PNG without filters."""
    start = content.index(b"IDAT")
    lines = np.frombuffer(zlib.decompress(content[start + 4 : content.index(b"IEND") - 8]), np.uint8).reshape(height, -1)
    assert not lines[:, 0].any()
    return lines[:, 1:].reshape(height, -1, channels)


def test_a_picture_is_small_and_from_black_to_white() -> None:
    image = np.zeros((1, 3, 96, 96), np.float32) - 2
    image[..., :48] = 3
    found = _picture({"x": image}, np.zeros(37, int))
    assert found is not None
    assert {name: found["picture"][name] for name in ("rows", "columns", "others")} == {"rows": 6, "columns": 6, "others": 1}
    pixels = pixels_of(base64.b64decode(found["picture"]["png"]), 64, 3)
    assert pixels.shape == (64, 64, 3)
    assert (pixels[:, :32] == 255).all()
    assert (pixels[:, 32:] == 0).all()
    assert _picture({"x": image, "y": image}, np.zeros(37, int)) is None
    assert _picture({"ids": np.zeros((1, 37), np.int64)}, np.zeros(37, int)) is None


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_come_out_of_the_file_as_they_went_in(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 5, channels), dtype=np.uint8)
    content = png(pixels)
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    assert (pixels_of(content, 3, channels) == pixels).all()
    assert png(pixels) == content


def test_ids_are_those_that_are_no_mask_and_no_places() -> None:
    feeds = {"mask": np.ones((1, 4), np.int64), "places": np.arange(4)[None], "ids": np.array([[5, 9, 5, 7]])}
    assert _text(feeds, np.zeros(4, int), {}) == {"ids": [5, 9, 5, 7]}
    assert _text(feeds, np.zeros(4, int), {5: "a", 7: "<b>"}) == {"ids": [5, 9, 5, 7], "words": ["a", None, "a", "<b>"]}
    assert _text({"x": np.ones((1, 4), np.float32)}, np.zeros(4, int), {}) == {}


@pytest.mark.parametrize(
    "vocabulary", [{"[PAD]": 0, "play": 1, "##ing": 2}, [["[PAD]", 0.0], ["play", -1.5], ["##ing", -2.5]]], ids=["WordPiece", "Unigram"]
)
def test_words_are_read_from_the_file_of_a_tokenizer(vocabulary: object, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": [{"id": 3, "content": "[NEW]"}]}))
    assert read_words(path) == {0: "[PAD]", 1: "play", 2: "##ing", 3: "[NEW]"}


@pytest.mark.parametrize("content", [None, "no json", "[]", '{"model": {}}', '{"model": {"vocab": {"a": "b"}}}'])
def test_what_is_no_tokenizer_is_an_error_before_the_search(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        onnxprune.prune(exports.path("vit", "do18-sdpa"), passes="tokens", calib="random", tokenizer=path)


def test_a_tokenizer_without_the_pass_is_an_error() -> None:
    with pytest.raises(InputError, match="tokens is not among the passes"):
        onnxprune.prune(exports.path("vit", "do18-sdpa"), calib="random", tokenizer="tokenizer.json")
