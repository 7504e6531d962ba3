"""Batches: trimming, fixed batch sizes, splitting and hashing."""

from __future__ import annotations

import numpy as np
import pytest

from onnxprune.calibration import CalibrationData, load_calibration
from onnxprune.errors import InputError
from tests.calibration.models import image_model, text_arrays, text_model


def text_data(**model_options: object) -> CalibrationData:
    return load_calibration({**text_arrays(), "labels": np.arange(10)}, text_model(**model_options))  # type: ignore[arg-type]


def test_trimmed_batches_are_as_wide_as_their_longest_row() -> None:
    data = text_data()
    assert data.token_mask is not None
    lengths = data.token_mask.sum(axis=1)
    widths = []
    for batch in data.batches(3, trim=True):
        assert batch.token_mask is not None
        widths.append(batch.feeds["input_ids"].shape[1])
        assert widths[-1] == lengths[batch.index].max()
        assert batch.feeds["attention_mask"].shape == batch.token_mask.shape == batch.feeds["input_ids"].shape
        np.testing.assert_array_equal(batch.feeds["input_ids"], data.inputs["input_ids"][batch.index, : widths[-1]])
        assert batch.labels is not None
        np.testing.assert_array_equal(batch.labels, batch.index)
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > widths[-1]


@pytest.mark.parametrize("trim", [False, True])
def test_every_row_comes_once(trim: bool) -> None:
    seen = np.concatenate([batch.index[batch.valid] for batch in text_data().batches(4, trim)])
    assert sorted(seen.tolist()) == list(range(10))
    if not trim:
        assert seen.tolist() == list(range(10))


def test_without_trimming_the_full_length_stays() -> None:
    assert {batch.feeds["input_ids"].shape[1] for batch in text_data().batches(3, trim=False)} == {12}


@pytest.mark.parametrize("options", [{"length": 12}, {"other_length": "other"}], ids=["fixed length", "mask of another symbol"])
def test_a_length_that_is_fixed_or_not_known_to_be_shared_is_never_trimmed(options: dict[str, object]) -> None:
    data = text_data(**options)
    assert data.token_mask is not None
    assert {batch.feeds["input_ids"].shape[1] for batch in data.batches(3, trim=True)} == {12}


def test_a_third_input_of_an_unknown_length_stops_trimming() -> None:
    model = text_model(positions=True)
    model.proto.graph.input[2].type.tensor_type.shape.dim[1].dim_param = "unrelated"
    arrays = text_arrays()
    data = load_calibration({**arrays, "position_ids": np.cumsum(arrays["attention_mask"], axis=1)}, model)
    assert {batch.feeds["position_ids"].shape[1] for batch in data.batches(3, trim=True)} == {12}
    assert {batch.feeds["input_ids"].shape[1] for batch in data.batches(3, trim=True)} == {12}


def test_a_mask_that_is_longer_than_the_tokens_is_not_trimmed() -> None:
    arrays = text_arrays()
    longer = np.concatenate([arrays["attention_mask"], np.zeros((10, 5), np.int64)], axis=1)
    data = load_calibration({**arrays, "attention_mask": longer}, text_model(other_length="past_and_seq"))
    assert {batch.feeds["attention_mask"].shape[1] for batch in data.batches(3, trim=True)} == {17}


def test_samples_of_loaded_data_are_chosen_again() -> None:
    data = text_data()
    again = load_calibration(data, text_model(), samples=8, seed=1)
    assert again.labels is not None
    assert len(set(again.labels.tolist())) == 8
    assert load_calibration(data, text_model(), samples=10) is data


def test_left_padding_goes_only_where_positions_are_fed() -> None:
    arrays = text_arrays(left=True)
    plain = load_calibration(arrays, text_model())
    assert {batch.feeds["input_ids"].shape[1] for batch in plain.batches(3, trim=True)} == {12}
    positions = np.cumsum(arrays["attention_mask"], axis=1)
    fed = load_calibration({**arrays, "position_ids": positions}, text_model(positions=True))
    for batch in fed.batches(3, trim=True):
        width = batch.feeds["input_ids"].shape[1]
        assert width == arrays["attention_mask"][batch.index].sum(axis=1).max() < 12
        np.testing.assert_array_equal(batch.feeds["position_ids"], positions[batch.index, 12 - width :])


def test_token_labels_are_trimmed_like_the_tokens() -> None:
    arrays = text_arrays()
    labels = np.arange(120).reshape(10, 12)
    for batch in load_calibration({**arrays, "labels": labels}, text_model()).batches(3, trim=True):
        assert batch.labels is not None
        np.testing.assert_array_equal(batch.labels, labels[batch.index, : batch.feeds["input_ids"].shape[1]])


def test_a_fixed_batch_size_is_filled_with_rows_that_do_not_count() -> None:
    data = text_data(batch=4)
    batches = list(data.batches(3, trim=True))
    assert [len(batch) for batch in batches] == [4, 4, 4]
    assert [int(batch.valid.sum()) for batch in batches] == [4, 4, 2]
    last = batches[-1]
    assert all(len(array) == 4 for array in last.feeds.values())
    assert last.index[2] == last.index[3] == last.index[1]
    assert last.token_mask is not None
    assert not last.token_mask[2:].any()
    assert last.feeds["attention_mask"][3].any()


def test_split_is_disjoint_and_repeatable() -> None:
    data = load_calibration({"pixels": np.arange(60.0, dtype=np.float32).reshape(20, 3)}, image_model())
    first, second = data.split(12, 6, seed=3)
    assert (len(first), len(second)) == (12, 6)
    kept, held = set(first.inputs["pixels"][:, 0]), set(second.inputs["pixels"][:, 0])
    assert not kept & held
    again, _ = data.split(12, 6, seed=3)
    other, _ = data.split(12, 6, seed=4)
    assert again.sha256 == first.sha256 != other.sha256


def test_a_split_beyond_the_rows_is_refused() -> None:
    with pytest.raises(InputError, match="cannot split 10 calibration rows"):
        text_data().split(8, 3, seed=0)


def test_take_keeps_inputs_labels_and_mask_together() -> None:
    data = text_data()
    part = data.take([7, 2])
    assert part.labels is not None
    assert part.token_mask is not None
    assert part.labels.tolist() == [7, 2]
    np.testing.assert_array_equal(part.token_mask, part.inputs["attention_mask"] != 0)
    np.testing.assert_array_equal(part.inputs["input_ids"][0], data.inputs["input_ids"][7])


def test_the_hash_sees_values_and_labels() -> None:
    arrays = text_arrays()
    plain = load_calibration(arrays, text_model()).sha256
    changed = {**arrays, "input_ids": arrays["input_ids"] + arrays["attention_mask"]}
    assert plain == load_calibration(dict(reversed(arrays.items())), text_model()).sha256
    assert plain != load_calibration(changed, text_model()).sha256
    assert plain != load_calibration({**arrays, "labels": np.arange(10)}, text_model()).sha256
