"""The drawing of tokens that leave, from plain records."""

from __future__ import annotations

from typing import Any

import pytest

from onnxprune.report import token_pictures

CUTS = [{"place": f"p{block}", "softmax": f"s{block}", "share": share, "block": block} for block, share in ((1, 0.75), (4, 0.5))]
PICTURE = {"rows": 2, "columns": 4, "others": 1, "png": "iVBORw0KGgo="}
IMAGE = {"stayed": [2, 0, 0, 2, 1, 2, 2, 2, 0], "picture": PICTURE}
TEXT = {"stayed": [2, 0, 1, 2, 2, None, None], "ids": [101, 7, 8, 9, 102, 0, 0]}


def record(*samples: Any, policy: str = "drop") -> dict[str, Any]:
    return {"tokens": {"chosen": {"policy": policy, "cuts": CUTS}, "schedules": [], "samples": list(samples)}}


def drawn(*samples: Any, policy: str = "drop") -> token_pictures.Drawing:
    found = token_pictures.tokens(record(*samples, policy=policy))
    assert found is not None
    return found


def said(sample: dict[str, Any]) -> str:
    (pieces,) = drawn(sample).texts
    return "".join(" " * (piece["gap"] and number > 0) + piece["text"] for number, piece in enumerate(pieces))


def test_where_no_token_leaves_nothing_is_drawn() -> None:
    assert token_pictures.tokens({}) is None
    assert token_pictures.tokens({"tokens": {"chosen": None, "schedules": [], "samples": []}}) is None


def test_each_place_is_covered_where_patches_left() -> None:
    (picture,) = drawn(IMAGE).pictures
    # patches: gone gone stays late | stays stays stays gone
    assert picture["covers"] == ["M0 0h2v1h-2zM3 1h1v1h-1z", "M0 0h2v1h-2zM3 0h1v1h-1zM3 1h1v1h-1z"]
    assert picture["kept"] == ["5 of 8 patches", "4 of 8 patches"]
    assert drawn(IMAGE).stages == ["all patches", "behind attention 1", "behind attention 4"]


def test_counts_are_those_of_the_rows() -> None:
    first, second = drawn(IMAGE, TEXT).places
    assert (first["before"], first["after"], second["before"], second["after"]) == ("5 to 9", "4 to 6", "4 to 6", "3 to 5")
    assert [place["before"] for place in drawn().places] == ["-", "-"]


def test_words_that_left_say_where_and_padding_is_not_shown() -> None:
    words = ["[CLS]", "play", "##ing", "outside", "[SEP]", "[PAD]", "[PAD]"]
    (pieces,) = drawn({**TEXT, "words": words}).texts
    assert [(piece["text"], piece["block"]) for piece in pieces] == [
        ("[CLS]", None),
        ("play", 1),
        ("ing", 4),
        ("outside", None),
        ("[SEP]", None),
    ]
    assert pieces[1]["opacity"] < pieces[2]["opacity"] < pieces[3]["opacity"] == 1


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["[CLS]", "play", "##ing", "out", "[SEP]"], "[CLS] playing out [SEP]"),
        (["<s>", "\u2581play", "ing", "\u2581out", "</s>"], "<s> playing out </s>"),
        (["<s>", "\u0120play", "ing", None, "</s>"], "<s> playing#9 </s>"),
    ],
)
def test_pieces_join_to_words(words: list[str | None], text: str) -> None:
    assert said({**TEXT, "words": [*words, None, None]}) == text


def test_without_a_tokenizer_ids_are_shown() -> None:
    assert said(TEXT) == "#101 #7 #8 #9 #102"


def test_of_many_places_five_are_drawn() -> None:
    many = record({**IMAGE, "stayed": [12] * 9})
    many["tokens"]["chosen"]["cuts"] = [{**CUTS[0], "block": block} for block in range(12)]
    found = token_pictures.tokens(many)
    assert found is not None
    assert [stage.split()[-1] for stage in found.stages] == ["patches", "0", "3", "6", "8", "11"]
    assert found.pictures[0]["covers"] == [""] * 5
    assert len(found.places) == 12


def test_what_became_of_those_that_left_is_said() -> None:
    assert drawn(IMAGE).fate == ""
    assert "joined" in drawn(IMAGE, policy="merge").fate
