"""``vocab``: rows of word tables that a corpus never reads."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.calibration.data import CalibrationData
from onnxprune.calibration.vocabulary import read_ids, special_ids
from onnxprune.errors import InputError, Refusal
from onnxprune.graph.model import Model
from onnxprune.graph.view import GraphView
from onnxprune.graph.vocabulary import FEW_ROWS, VocabMap, Vocabulary, WordTables, nearest_rows, other_reader, word_tables
from onnxprune.passes.base import WholePass

VOCAB = WholePass(
    name="vocab",
    kind="words",
    summary="drop rows of word embeddings that the data never reads",
    detail=(
        "Rows of ids that neither the calibration data nor --keep-ids nor the tokenizer's special tokens name go. Outputs for the data "
        "stay the same bit for bit; every other id is still taken, and reads the row that stays and is most like its own. A map in "
        "front of the table leaves the inputs as they are; with --vocab-map file the tokenizer applies it."
    ),
)


@dataclass(frozen=True)
class Coverage:
    """What the rows of one set of tables are good for.

    ``unseen`` is the share of tokens of new text that are expected to have lost their row: ids seen once, over all tokens (the estimate of
    Good, 1953).
    """

    inputs: tuple[str, ...]
    tables: tuple[str, ...]
    rows: int
    kept: int
    saved_bytes: int
    unseen: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Reduction:
    """The vocabularies decided on, where their map goes, and what they cover."""

    vocabularies: tuple[Vocabulary, ...] = ()
    place: VocabMap = "graph"
    coverage: tuple[Coverage, ...] = ()
    refusals: tuple[Refusal, ...] = ()


def choose_vocabularies(model: Model, corpus: CalibrationData | None, keep_ids: Path | None, place: VocabMap) -> Reduction:
    """Decide which rows stay.

    Args:
        model: the canonical model; files beside its source name the special ids.
        corpus: rows whose ids all stay; None if there is no data that means anything.
        keep_ids: file with more ids.

    Raises:
        InputError: neither data nor a list, or an id that no table has.
    """
    if corpus is None and keep_ids is None:
        raise InputError("vocab needs to know which ids occur: give real data with --calib, or a list with --keep-ids")
    view = GraphView(model)
    groups, refusals = word_tables(view)
    special = special_ids(model.source.path if model.source else None)
    listed = read_ids(keep_ids) if keep_ids is not None else np.zeros(0, np.int64)
    found: list[Vocabulary] = []
    coverage: list[Coverage] = []
    for group in groups:
        if corpus is not None and _counts_up(corpus, group):
            continue
        if listed.size and listed[-1] >= group.rows:
            raise InputError(f"{keep_ids} names id {listed[-1]}, but the table of {', '.join(group.inputs)} has {group.rows} rows")
        result = _reduce(view, group, corpus, listed, special)
        if result is None:
            continue
        found.append(result[0])
        coverage.append(result[1])
        reader = other_reader(view, group) if place == "file" else None
        if reader is not None:
            ids = ", ".join(group.inputs)
            reason = f"{reader} reads the ids of {ids} as well, so that they must stay as they are: the map goes into the graph"
            refusals, place = (*refusals, Refusal("OP505", group.inputs[0], reason)), "graph"
    if not found and not any(refusal.code in ("OP501", "OP502", "OP503") for refusal in refusals):
        reason = f"no table of more than {FEW_ROWS} rows whose rows the ids of a graph input pick has rows to lose"
        refusals = (*refusals, Refusal("OP506", "vocab", reason))
    return Reduction(tuple(found), place if found else "graph", tuple(coverage), refusals)


def _ids(corpus: CalibrationData | None, group: WordTables, padding: bool = True) -> np.ndarray:
    """Ids of the corpus as indices that are not negative, int64 [n]; none without a corpus."""
    if corpus is None:
        return np.zeros(0, np.int64)
    arrays = [np.asarray(corpus.inputs[name], np.int64) for name in group.inputs]
    mask = corpus.token_mask
    shown = [array if padding or mask is None or mask.shape != array.shape else array[mask] for array in arrays]
    joined = np.concatenate([array.reshape(-1) for array in shown])
    return np.where(joined < 0, joined + group.rows, joined)


def _counts_up(corpus: CalibrationData, group: WordTables) -> bool:
    """Every row of the input counts up by one: places, whatever the input is called."""
    arrays = [corpus.inputs[name] for name in group.inputs]
    return all(array.ndim > 1 and array.shape[-1] > 1 and bool((np.diff(array, axis=-1) == 1).all()) for array in arrays)


def _reduce(
    view: GraphView, group: WordTables, corpus: CalibrationData | None, listed: np.ndarray, special: frozenset[int]
) -> tuple[Vocabulary, Coverage] | None:
    """The vocabulary of one set of tables; None if all rows occur."""
    named = [value for value in special if value < group.rows]
    kept = np.unique(np.concatenate([_ids(corpus, group), listed, np.array(named, np.int64)]))
    if len(kept) >= group.rows:
        return None
    if kept.size and kept[-1] >= group.rows:
        raise InputError(f"the data holds id {kept[-1]}, but the table of {', '.join(group.inputs)} has {group.rows} rows")
    tables = [view.value(name) for name in group.tables]
    first = tables[0]
    assert first is not None
    vocabulary = Vocabulary(group.inputs, group.lookups, nearest_rows(first, kept))
    width = sum(table.nbytes // group.rows for table in tables if table is not None)
    saved = (group.rows - len(kept)) * width
    covered = Coverage(group.inputs, group.tables, group.rows, len(kept), saved, _unseen(corpus, group))
    return vocabulary, covered


def _unseen(corpus: CalibrationData | None, group: WordTables) -> float | None:
    """Share of tokens of new text whose id the corpus lacks, by ids that occur once; None without a corpus."""
    ids = _ids(corpus, group, padding=False)
    if not ids.size:
        return None
    _, counts = np.unique(ids, return_counts=True)
    return float((counts == 1).sum() / ids.size)
