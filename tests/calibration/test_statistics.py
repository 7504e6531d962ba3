"""Sums that merge, are saved whole, and refuse what does not belong together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxprune.calibration import Statistics
from onnxprune.calibration.statistics import SampleMoment, SecondMoment
from onnxprune.errors import InputError


def gathered(values: list[int]) -> Statistics:
    statistics = Statistics()
    for value in values:
        statistics.add("/layer.0/ffn: gram", np.full((2, 3), value, np.float32), 4)
        statistics.add("scalar", value)
    return statistics


@given(st.lists(st.integers(-1000, 1000), min_size=1), st.integers(0, 100))
def test_merging_parts_equals_gathering_all(values: list[int], cut: int) -> None:
    cut %= len(values) + 1
    first, second = gathered(values[:cut]), gathered(values[cut:])
    assert first + second == second + first == gathered(values)


def test_sums_are_double_and_means_divide_by_the_count() -> None:
    statistics = Statistics()
    statistics.add("x", np.array([1e8], np.float32), 3)
    statistics.add("x", np.array([1.0], np.float32), 1)
    assert statistics["x"].dtype == np.float64
    assert statistics["x"][0] == 1e8 + 1
    assert statistics.mean("x")[0] == (1e8 + 1) / 4
    assert "x" in statistics
    assert "y" not in statistics


def test_adding_does_not_change_the_array_given() -> None:
    value = np.ones(3)
    statistics = Statistics()
    statistics.add("x", value)
    statistics.add("x", value)
    merged = statistics + statistics
    assert value.tolist() == [1, 1, 1]
    assert statistics["x"].tolist() == [2, 2, 2]
    assert merged["x"].tolist() == [4, 4, 4]


def test_equality_sees_values_counts_and_names() -> None:
    assert gathered([1]) != gathered([2])
    other = gathered([1])
    other.add("scalar", 0)
    assert other != gathered([1])
    assert gathered([]) != gathered([0])


def test_shapes_must_agree() -> None:
    statistics = gathered([1])
    with pytest.raises(InputError, match=r"'scalar' has shape \[2\], before \[\]"):
        statistics.add("scalar", np.zeros(2))


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(InputError, match="'x' is not finite"):
        Statistics().add("x", np.array([1.0, np.nan]))


def test_round_trip(tmp_path: Path) -> None:
    statistics = gathered([3, 1])
    path = statistics.save(tmp_path / "s.npz")
    assert Statistics.load(path) == statistics
    assert [file.name for file in tmp_path.iterdir()] == ["s.npz"]
    assert path.read_bytes() == gathered([3, 1]).save(tmp_path / "t.npz").read_bytes()


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = gathered([1]).save(tmp_path / "s.npz")

    def full(stream, **arrays):  # type: ignore[no-untyped-def]
        stream.write(b"PK")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(InputError, match="No space left"):
        gathered([2]).save(path)
    assert Statistics.load(path) == gathered([1])
    assert [file.name for file in tmp_path.iterdir()] == ["s.npz"]


def test_files_that_are_no_statistics_are_refused(tmp_path: Path) -> None:
    path = gathered([1]).save(tmp_path / "s.npz")
    raw = path.read_bytes()
    for content in (b"", b"text", raw[: len(raw) // 2]):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"s\.npz"):
            Statistics.load(path)
    np.savez(path, pixels=np.zeros(3))
    with pytest.raises(InputError, match="not a statistics file"):
        Statistics.load(path)
    np.savez(path, index=np.array('{"schema": "onnxprune.statistics/9"}'))
    with pytest.raises(InputError, match="statistics/9"):
        Statistics.load(path)
    with pytest.raises(InputError, match="statistics not found"):
        Statistics.load(tmp_path / "no.npz")


@pytest.mark.parametrize("width", [1, 511, 512, 513, 1100])
def test_a_second_moment_is_that_of_all_rows_however_they_came(width: int) -> None:
    rows = np.random.default_rng(width).standard_normal((700, width)).astype(np.float32) + 1
    moment = SecondMoment(width)
    for part in np.array_split(rows, [1, 100, 650]):
        moment.add(part)
    exact = rows.astype(np.float64)
    np.testing.assert_allclose(moment.mean, exact.T @ exact / 700, atol=1e-4)
    np.testing.assert_array_equal(moment.mean, moment.mean.T)
    np.testing.assert_allclose(moment.covariance, np.cov(exact.T, bias=True).reshape(width, width), atol=1e-4)


@pytest.mark.parametrize("width", [3, 40])
def test_what_tokens_have_in_common_is_what_their_means_make(width: int) -> None:
    """With padding, a sample of padding alone, and more samples than wait."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((30, 7, width)).astype(np.float32) + rng.standard_normal((30, 1, width)).astype(np.float32)
    real = np.arange(7) < rng.integers(1, 8, 30)[:, None]
    real[4] = False
    moment = SampleMoment(width)
    for part in np.array_split(np.arange(30), [5, 6, 20]):
        moment.add(rows[part].reshape(-1, width), real[part].reshape(-1), len(part))
    samples = [row[there].astype(np.float64) for row, there in zip(rows, real, strict=True) if there.any()]
    assert moment.rows == sum(map(len, samples)) == real.sum()
    means = [np.tile(sample.mean(axis=0), (len(sample), 1)) for sample in samples]
    np.testing.assert_allclose(moment.common, sum(mean.T @ mean for mean in means) / moment.rows, atol=1e-5)
    own = sum((sample - mean).T @ (sample - mean) for sample, mean in zip(samples, means, strict=True)) / moment.rows
    np.testing.assert_allclose(moment.all.mean - moment.common, own, atol=1e-5)
    sums = np.array([sample.sum(axis=0) for sample in samples])
    np.testing.assert_allclose(moment.summed, sums.T @ sums, rtol=1e-4, atol=1e-2)
