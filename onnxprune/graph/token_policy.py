"""What becomes of tokens at one place: they leave, are packed into one, or merge with those that are like them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from onnxprune.graph.emitter import Emitter

GONE = 1e-30
"""Size of a token that is not there: its logarithm is added to attention scores."""

_END = 2**62
_ROUNDING = 1e-4


@dataclass(frozen=True)
class Stretch:
    """Tokens between two places.

    ``count`` is their number, int64 [1]. ``index`` int64 [B, count]: where they were in the stretch before, None if they are no
    selection of those. ``sizes`` float [B, count]: how many tokens each stands for, 0 for padding; None if all are one. ``weights``:
    the same for means over tokens, where it always sums to the number of all. ``packages``: how many of the last ones are packages, the
    newest of which ``index`` does not tell. ``fixed``: int64 [count], the same as ``index`` where all samples keep the same tokens.
    ``moves``: where tokens of the stretch before are now, int64 [B, count before], if that is not told by ``index``. ``staying``: then
    those of the first set that joined none of the second, int64 [B, S].
    """

    count: str
    index: str | None = None
    sizes: str | None = None
    weights: str | None = None
    packages: int = 0
    fixed: np.ndarray | None = None
    moves: str | None = None
    staying: str | None = None


def kept_of(share: float, tokens: int) -> int:
    """How many of a number of tokens a share is; at least one."""
    return max(int(np.ceil(share * tokens - _ROUNDING)), 1)


class Choice:
    """Writes the operators of one place after the other.

    Args:
        leading: tokens in front that always stay.
        known: number of tokens, if it is the same for all inputs.
        count, batch: number of tokens and of samples, int64 [1].
        real: 1 for tokens that are not padding, float [B, N]; None if all are.
    """

    def __init__(self, emitter: Emitter, leading: int, known: int | None, count: str, batch: str, real: str | None) -> None:
        self.e, self.leading, self.known, self.batch, self.real = emitter, leading, known, batch, real
        self.first = count
        self.whole = emitter.op("Sub", count, emitter.int64([leading])) if leading else count

    def keep(self, features: str, fixed: np.ndarray) -> tuple[str, Stretch]:
        """Keep the same tokens of every sample, int64 [K], the leading ones among them."""
        assert self.known is not None
        each = np.full((1, len(fixed)), (self.known - self.leading) / max(len(fixed) - self.leading, 1), np.float32)
        each[:, : self.leading] = 1
        kept = self.e.op("Gather", features, self.e.array(fixed), axis=1)
        return kept, Stretch(self.e.int64([len(fixed)]), weights=self.e.array(each), fixed=fixed)

    def join(self, features: str, joins: np.ndarray, masses: np.ndarray) -> tuple[str, Stretch]:
        """Tokens become the means that they are part of, the same in every sample: a product with one constant matrix.

        Args:
            joins: for each token that is there, the number of its mean, int64 [N].
            masses: how many tokens each stands for, [N].
        """
        e = self.e
        sums = np.bincount(joins, masses).astype(np.float32)
        means = np.zeros((len(sums), len(joins)), np.float32)
        means[joins, np.arange(len(joins))] = masses / sums[joins]
        # As the left factor: what quantizes or trains matrices looks for constants on the right.
        joined = e.op("MatMul", e.array(means), features)
        sizes = e.array(sums[None])
        first = np.unique(joins, return_index=True)[1]
        count = e.int64([len(sums)])
        return joined, Stretch(count, self._row(e.array(first)), sizes, sizes, moves=self._row(e.array(joins)))

    def select(self, features: str, scores: str, share: float, before: Stretch, package: bool) -> tuple[str, Stretch]:
        """Keep the ``share`` of all tokens that scores highest; returns their features [B, K, C], and what they are.

        Args:
            scores: float [B, N].
            package: make one more token of those that leave. Packages of places before stay as they are.
        """
        e, scores = self.e, self._free(scores, before)
        if self.real is None:
            return self._select_fixed(features, scores, share, before, package)
        tokens = e.reduce("ReduceSum", self._free(self.real, Stretch(self.first)), [1], keepdims=True)
        wanted = e.op("Max", self._share_of(tokens, share), self.number(1.0))
        return self._select_real(features, scores, wanted, before, package)

    def select_above(self, features: str, scores: str, threshold: float, before: Stretch) -> tuple[str, Stretch]:
        """Keep tokens whose score is at least ``threshold`` times the mean over real tokens of their sample, and one in any case.

        What is not attended, padding, scores nothing; the threshold does not depend on how much of it there is (LTP; Kim et al., 2022).

        Args:
            scores: float [B, N].
        """
        e, sizes = self.e, before.sizes or self.real
        assert sizes is not None
        mean = e.op("Div", *(e.reduce("ReduceSum", tensor, [1], keepdims=True) for tensor in (scores, sizes)))
        enough = e.op("Cast", e.op("GreaterOrEqual", scores, e.op("Mul", mean, self.number(threshold))), to=TensorProto.FLOAT)
        above = self._free(e.op("Mul", enough, sizes), before)
        wanted = e.op("Max", e.reduce("ReduceSum", above, [1], keepdims=True), self.number(1.0))
        return self._select_real(features, self._free(scores, before), wanted, before, False)

    def _select_fixed(self, features: str, scores: str, share: float, before: Stretch, package: bool) -> tuple[str, Stretch]:
        """The same number of every sample."""
        e, lead, total = self.e, self.leading, self._others(before)
        keep = self._kept(share)
        order = self._shifted(e.ops(2, "TopK", scores, total if package else keep, axis=1)[1])
        index = self._between(e.slice(order, 1, e.int64([0]), keep) if package else order, before)
        kept = self.take(features, index)
        count = e.op("Add", keep, e.int64([lead + before.packages + package]))
        if not package:
            if before.sizes is not None:
                left = self.take(before.sizes, index)
                return kept, Stretch(count, index, left, self._weights(left))
            each = e.op("Expand", e.op("Div", self._float(self.whole), self._float(keep)), keep)
            ones = [e.array(np.ones(lead, np.float32))] if lead else []
            return kept, Stretch(count, index, None, e.unsqueeze(e.op("Concat", *ones, each, axis=0), 0))
        rest = e.slice(order, 1, keep, total)
        sizes = before.sizes or self._ones(before.count)
        leaving = self.take(sizes, rest)
        packed, mass = self._packed(leaving, self.take(features, rest), kept)
        made = e.op("Concat", self.take(sizes, index), mass, axis=1)
        return e.op("Concat", kept, packed, axis=1), Stretch(count, index, made, made, packages=before.packages + 1)

    def _select_real(self, features: str, scores: str, wanted: str, before: Stretch, package: bool) -> tuple[str, Stretch]:
        """Of each sample as many real tokens as wanted, float [B, 1]: the batch has room for the most, and the others hide the rest."""
        e, lead, total = self.e, self.leading, self._others(before)
        assert self.real is not None
        sizes = before.sizes or self.real
        tokens = e.reduce("ReduceSum", self._free(self.real, Stretch(self.first)), [1], keepdims=True)
        room = e.op("Cast", e.op("Reshape", e.reduce("ReduceMax", wanted, [0, 1], keepdims=False), e.int64([1])), to=TensorProto.INT64)
        there = e.op("Greater", self._free(sizes, before), self.number(0.0))
        order = self._shifted(e.ops(2, "TopK", e.op("Where", there, scores, self.number(-1.0)), total, axis=1)[1])
        ranks = e.op("Cast", self._range(total), to=TensorProto.FLOAT)
        stays = e.op("Cast", e.op("Less", e.unsqueeze(ranks, 0), wanted), to=TensorProto.FLOAT)
        ranked = self.take(sizes, order)
        staying = e.op("Mul", ranked, stays)
        index = self._between(e.slice(order, 1, e.int64([0]), room), before)
        kept = self.take(features, index)
        remaining = e.slice(staying, 1, e.int64([0]), room)
        count = e.op("Add", room, e.int64([lead + before.packages + package]))
        if not package:
            each = e.op("Div", tokens, e.op("Max", e.reduce("ReduceSum", remaining, [1], keepdims=True), self.number(1.0)))
            weights = self._with_leading(sizes, e.op("Mul", remaining, each))
            return kept, Stretch(count, index, self._with_leading(sizes, remaining), weights)
        packed, mass = self._packed(e.op("Sub", ranked, staying), self.take(features, order), kept)
        packages = [e.slice(sizes, 1, e.int64([-before.packages]), e.int64([_END]))] if before.packages else []
        made = e.op("Concat", self._with_leading(sizes, remaining), *packages, mass, axis=1)
        return e.op("Concat", kept, packed, axis=1), Stretch(count, index, made, made, packages=before.packages + 1)

    def _packed(self, sizes: str, features: str, kept: str) -> tuple[str, str]:
        """Mean of features [B, R, C] by sizes [B, R]: float [B, 1, C], and the sum of sizes [B, 1].

        Of nothing it is one of the features that are kept: what has no size is not seen, but it must have a norm.
        """
        e, trace = self.e, self.number(GONE)
        mass = e.reduce("ReduceSum", sizes, [1], keepdims=True)
        total = e.reduce("ReduceSum", e.op("Mul", features, e.unsqueeze(sizes, 2)), [1], keepdims=True)
        some = e.op("Mul", e.slice(kept, 1, e.int64([0]), e.int64([1])), trace)
        return e.op("Div", e.op("Add", total, some), e.unsqueeze(e.op("Add", mass, trace), 2)), mass

    def merge(self, features: str, share: float, before: Stretch) -> tuple[str, Stretch]:
        """Tokens belong in turn to two sets; those of the first that are most like one of the second join it (ToMe, Bolya et al., 2023).

        Likeness is the cosine of features, which lost far less than that of keys. At most half of the tokens merge at one place.
        """
        e, lead, total = self.e, self.leading, self._others(before)
        end, zero, one, two = e.int64([_END]), e.int64([0]), e.int64([1]), e.int64([2])
        leaving = e.op("Sub", total, e.op("Max", self._kept(share), e.op("Div", total, two)))
        first_set, second_set = e.op("Div", e.op("Add", total, one), two), e.op("Div", total, two)
        starts = e.int64([lead]), e.int64([lead + 1])
        unit = e.op("Div", features, e.reduce("ReduceL2", features, [2], keepdims=True))
        ours, theirs = (e.slice(unit, 1, start, end, 2) for start in starts)
        best, nearest = e.ops(2, "TopK", e.op("MatMul", ours, e.transpose(theirs, [0, 2, 1])), one, axis=2)
        order = e.ops(2, "TopK", best, first_set, axis=1)[1]  # [B, first set, 1], as GatherND takes it
        joining = e.slice(order, 1, zero, leaving)
        targets = e.squeeze(e.op("GatherND", nearest, joining, batch_dims=1), 2)
        joins = e.op("OneHot", targets, second_set, e.array(np.array([0, 1], np.float32)), axis=1)
        # Sums of features, with their sizes as one more column, so that one product adds up both.
        if before.sizes is None:
            sums = e.op("Pad", features, e.array(np.array([0, 0, 0, 0, 0, 1], np.int64)), self.number(1.0))
        else:
            column = e.unsqueeze(before.sizes, 2)
            sums = e.op("Concat", e.op("Mul", features, column), column, axis=2)
        first, second = (e.slice(sums, 1, start, end, 2) for start in starts)
        ordered = e.op("GatherND", first, order, batch_dims=1)
        joined = e.op("Add", second, e.op("MatMul", joins, e.slice(ordered, 1, zero, leaving)))
        leading = [e.slice(sums, 1, zero, e.int64([lead]))] if lead else []
        result = e.op("Concat", *leading, e.slice(ordered, 1, leaving, end), joined, axis=1)
        mass = e.slice(result, 2, e.int64([-1]), end)
        sizes = e.squeeze(mass, 2)
        merged = e.op("Div", e.slice(result, 2, zero, e.int64([-1])), mass)
        weights = sizes if before.weights == before.sizes else self._weights(sizes)
        order = e.squeeze(order, 2)
        moves = self._merged(order, targets, e.op("Sub", first_set, leaving), second_set)
        staying = e.slice(order, 1, leaving, end)
        return merged, Stretch(e.op("Sub", before.count, leaving), None, sizes, weights, moves=moves, staying=staying)

    def _merged(self, order: str, targets: str, stay: str, second: str) -> str:
        """Where tokens are after a merge, int64 [B, all that were there].

        Args:
            order: tokens of the first set, those that join one of the second first, int64 [B, A].
            targets: tokens of the second set that they join, int64 [B, A - stay].
            stay: how many of the first set do not join, int64 [1]; ``second``: how many are in the second.
        """
        e = self.e
        first, two = e.int64([self.leading]), e.int64([2])
        behind = e.op("Add", first, stay)
        joined = self._row(self._range(second))
        leading = [self._row(e.array(np.arange(self.leading, dtype=np.int64)))] if self.leading else []
        of_second = e.op("Add", e.op("Mul", joined, two), e.int64([self.leading + 1]))
        were = e.op("Concat", *leading, e.op("Add", e.op("Mul", order, two), first), of_second, axis=1)
        staying = e.op("Add", self._row(self._range(stay)), first)
        are = e.op("Concat", *leading, e.op("Add", targets, behind), staying, e.op("Add", joined, behind), axis=1)
        return e.op("ScatterElements", were, were, are, axis=1)

    def _row(self, numbers: str) -> str:
        """int64 [K] for every sample, [B, K]."""
        return self.e.op("Expand", self.e.unsqueeze(numbers, 0), self.e.op("Concat", self.batch, self.e.int64([1]), axis=0))

    def _weights(self, sizes: str) -> str:
        """Of sizes [B, N], where some tokens left for good: those behind the leading ones count for them as well."""
        e = self.e
        rest = e.slice(sizes, 1, e.int64([self.leading]), e.int64([_END])) if self.leading else sizes
        each = e.op("Div", self._float(self.whole), e.reduce("ReduceSum", rest, [1], keepdims=True))
        return self._with_leading(sizes, e.op("Mul", rest, each))

    # Small expressions.

    def _others(self, before: Stretch) -> str:
        """How many tokens may leave: all but the leading ones and packages, int64 [1]."""
        staying = self.leading + before.packages
        return self.e.op("Sub", before.count, self.e.int64([staying])) if staying else before.count

    def take(self, tensor: str, index: str) -> str:
        """Rows of axis 1 of [B, N, ...] by int64 [B, K]."""
        return self.e.op("GatherND", tensor, self.e.unsqueeze(index, 2), batch_dims=1)

    def number(self, value: float) -> str:
        return self.e.array(np.array(value, np.float32))

    def _kept(self, share: float) -> str:
        """How many tokens a share of all is, the leading ones not counted; at least one. int64 [1]."""
        if self.known is not None:
            return self.e.int64([kept_of(share, self.known - self.leading)])
        some = self._share_of(self._float(self.whole), share)
        return self.e.op("Cast", self.e.op("Max", some, self.number(1.0)), to=TensorProto.INT64)

    def _share_of(self, tokens: str, share: float) -> str:
        return self.e.op("Ceil", self.e.op("Sub", self.e.op("Mul", tokens, self.number(share)), self.number(_ROUNDING)))

    def _free(self, tensor: str, before: Stretch) -> str:
        """Columns of tokens that may leave: neither leading ones nor packages."""
        if not (self.leading or before.packages):
            return tensor
        end = self.e.op("Sub", before.count, self.e.int64([before.packages])) if before.packages else before.count
        return self.e.slice(tensor, 1, self.e.int64([self.leading]), end)

    def _shifted(self, order: str) -> str:
        """Places among all tokens of places behind the leading ones."""
        return self.e.op("Add", order, self.e.int64([self.leading])) if self.leading else order

    def _between(self, index: str, before: Stretch) -> str:
        """An index, int64 [B, K], with the leading tokens in front and the packages behind."""
        e = self.e
        leading = [self._row(e.array(np.arange(self.leading, dtype=np.int64)))] if self.leading else []
        packages = []
        if before.packages:
            packages = [self._row(e.op("Add", before.count, e.array(np.arange(-before.packages, 0, dtype=np.int64))))]
        return e.op("Concat", *leading, index, *packages, axis=1) if leading or packages else index

    def _with_leading(self, sizes: str, rest: str) -> str:
        if not self.leading:
            return rest
        return self.e.op("Concat", self.e.slice(sizes, 1, self.e.int64([0]), self.e.int64([self.leading])), rest, axis=1)

    def all_real(self) -> str:
        """Ones for all tokens, float [B, N]: nothing is padding yet."""
        return self._ones(self.first)

    def _ones(self, count: str) -> str:
        one = self.e.array(np.ones((1, 1), np.float32))
        return self.e.op("Expand", one, self.e.op("Concat", self.batch, count, axis=0))

    def _range(self, count: str) -> str:
        zero, one = (self.e.array(np.array(value, np.int64)) for value in (0, 1))
        return self.e.op("Range", zero, self.e.squeeze(count, 0), one)

    def _float(self, tensor: str) -> str:
        return self.e.op("Cast", tensor, to=TensorProto.FLOAT)
