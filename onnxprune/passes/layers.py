"""``layers``: sublayers that a small map, a constant or nothing at all can stand in for.

Depth is what trained methods learn gates for (WDPruning, Yu et al., AAAI 2022; UVC, Yu et al., ICLR 2022). Here every attention and every
FFN is offered four substitutes fitted by least squares: nothing, the mean of what it should add, a linear map of what it reads (TOAST,
Cannistraci et al., 2024), and the best map of low rank. Sublayers go one by one, the one first whose substitute changes the outputs least
for what it saves; what later ones are fitted to is the dense model's stream, from the inputs that the shallower model gives them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import linalg

from onnxprune.calibration.data import CalibrationData
from onnxprune.calibration.stream import stream
from onnxprune.compensate.ridge import NormalEquations
from onnxprune.errors import InputError, Refusal
from onnxprune.graph.anatomy import Anatomy
from onnxprune.graph.depth import DEPTHS
from onnxprune.graph.instrument import with_outputs
from onnxprune.graph.layers import Sublayer, Substitute, find_sublayers, substitute
from onnxprune.graph.macs import count_macs
from onnxprune.graph.model import Model
from onnxprune.graph.profile import Profile, shapes_of, take_profile
from onnxprune.passes.base import WholePass
from onnxprune.runtime.session import Feeds, RuntimeOptions

LAYERS = WholePass(
    name="layers",
    kind="layers",
    summary="replace whole attentions and FFNs by nothing, a constant or a linear map",
    detail=(
        "Every sublayer is offered substitutes fitted by least squares on calibration rows: nothing, a constant, a matrix, two thin "
        "matrices. Sublayers whose substitute changes the outputs least for the work it saves go first. Alone, as many go as the target "
        "asks for; with other passes the result with fewer sublayers is kept where held-back rows prefer it to the one with all."
    ),
)

COLLAPSE = 0.5
"""Depth is not reduced beyond this divergence from the model as given, in nats, for vectors as 1 - cosine."""

THIN = 4
"""The map of low rank has this part of the stream's width as its rank."""

_RIDGE = 1e-4
_LOOK = 3
"""How many sublayers are tried again after one went: the best by what was known before."""


@dataclass(frozen=True, eq=False)
class Replaced:
    """One sublayer and what stands in for it; ``error`` is the divergence from the model as given with it and all before it."""

    sublayer: Sublayer
    label: str
    kind: str
    substitute: Substitute
    error: float


@dataclass(frozen=True, eq=False)
class Shallow:
    """A model of fewer sublayers, its shapes, and what was replaced, in the order in which it went."""

    model: Model
    profile: Profile
    replaced: tuple[Replaced, ...] = ()

    @property
    def error(self) -> float:
        return self.replaced[-1].error if self.replaced else 0.0

    @property
    def substitutes(self) -> dict[str, Substitute]:
        """By name of the sublayer."""
        return {item.sublayer.name: item.substitute for item in self.replaced}

    def as_dict(self) -> list[dict[str, object]]:
        """What was replaced by what, and what the outputs had changed by then."""
        return [{"sublayer": item.label, "by": item.kind, "divergence": item.error} for item in self.replaced]


@dataclass(frozen=True)
class Bench:
    """What sublayers are judged with.

    ``rows`` fit substitutes, ``error`` is the divergence of a model from the file as given and ``glance`` the same on few rows, by which
    sublayers are put in a first order; ``protected`` are patterns of site names.
    """

    rows: CalibrationData
    error: Callable[[Model], float]
    glance: Callable[[Model], float]
    request: Feeds
    options: RuntimeOptions
    protected: Sequence[str] = ()
    samples: Mapping[str, np.ndarray] | None = None
    report: Callable[[int, int], None] = field(default=lambda done, total: None)


def shallower_models(anatomy: Anatomy, bench: Bench) -> Iterator[Shallow] | Refusal:
    """Models of one sublayer less, two less, and so on, each replacing what the one before does, while anything of the outputs is left.

    Returns:
        Models, each made when it is asked for, or why there is none (OP801, OP802).
    """
    model = anatomy.model
    if model.paged:
        return Refusal("OP802", "layers", "the model is too large to try it without each of its sublayers", "use heads, ffn and int8")
    sublayers = find_sublayers(anatomy.view, anatomy.profile)
    names = {each.name: site_names(each, anatomy) for each in sublayers}
    open_ = [each for each in sublayers if not any(re.search(pattern, name) for pattern in bench.protected for name in names[each.name])]
    if not open_:
        found = (
            "all of them are protected by --keep or --exclude" if sublayers else "no branch reads one residual stream and is added to it"
        )
        return Refusal(
            "OP801", "layers", f"no sublayer can be replaced: {found}", "leave layers out; heads and ffn need no residual stream"
        )
    return _descent(model, anatomy, open_, sublayers, {name: inside[0] for name, inside in names.items()}, bench)


def _descent(
    model: Model, anatomy: Anatomy, left: list[Sublayer], sublayers: tuple[Sublayer, ...], labels: Mapping[str, str], bench: Bench
) -> Iterator[Shallow]:
    """Always that sublayer next whose best substitute costs least divergence for the multiply-adds it saves."""
    shapes = shapes_of(model, bench.request)
    macs = count_macs(model, shapes)
    nodes = anatomy.view.nodes
    work = {each.name: sum(macs.get(nodes[index].name, 0) for index in each.nodes) for each in left}
    rows = {each.name: int(np.prod(shapes[each.start][:-1])) for each in left}
    replaced: tuple[Replaced, ...] = ()
    student, error, most = model, 0.0, len(left)

    def tried(offers: Mapping[str, Mapping[str, Substitute]], judge: Callable[[Model], float]) -> Iterator[tuple[float, Replaced]]:
        """Substitutes that save work, with the divergence that each adds for it."""
        for name, kinds in offers.items():
            sublayer = next(each for each in left if each.name == name)
            for kind, stand_in in kinds.items():
                saved = work[name] - rows[name] * sum(factor.size for factor in stand_in.factors)
                if saved > 0:
                    chosen = {**{item.sublayer.name: item.substitute for item in replaced}, name: stand_in}
                    found = judge(substitute(model, sublayers, chosen))
                    yield (found - error) / saved, Replaced(sublayer, labels[name], kind, stand_in, found)

    def prices(found: Iterable[tuple[float, Replaced]]) -> dict[str, float]:
        """Of each sublayer by its best substitute."""
        best: dict[str, float] = {}
        for value, item in found:
            best[item.sublayer.name] = min(value, best.get(item.sublayer.name, np.inf))
        return best

    price = prices(tried(fitted(model, model, left, bench.rows, bench.options), bench.glance))
    while left:
        left.sort(key=lambda each: price.get(each.name, np.inf))
        found = list(tried(fitted(model, student, left[:_LOOK], bench.rows, bench.options), bench.error))
        price |= prices(found)
        if not found:
            return
        _, best = min(found, key=lambda each: each[0])
        if not best.error <= COLLAPSE:
            return
        replaced, error = (*replaced, best), best.error
        left.remove(best.sublayer)
        student = substitute(model, sublayers, {item.sublayer.name: item.substitute for item in replaced})
        bench.report(len(replaced), most)
        yield Shallow(student, take_profile(student, bench.samples), replaced)


def fitted(
    teacher: Model, student: Model, sublayers: Sequence[Sublayer], data: CalibrationData, options: RuntimeOptions
) -> dict[str, dict[str, Substitute]]:
    """Substitutes by sublayer and kind, after which the student's stream is the teacher's as nearly as it can be; padding does not count.

    Args:
        teacher: the model with all sublayers.
        student: the model with those replaced that went already.
    """
    sums = {each.name: NormalEquations(each.width, each.width) for each in sublayers}
    made = tuple(dict.fromkeys(each.join.outputs[0] for each in sublayers))
    read = tuple(dict.fromkeys(name for each in sublayers for name in (each.start, each.stream)))
    runs = (
        stream(with_outputs(model, names, keep=False), data, names, options=options) for model, names in ((teacher, made), (student, read))
    )
    for (batch, wanted), (same, given) in zip(*runs, strict=True):
        if not np.array_equal(batch.index, same.index):
            raise InputError("short of memory: one model ran on fewer rows at a time than the other; free some, or leave layers out")
        for each in sublayers:
            x, base = (given[name].reshape(-1, each.width) for name in (each.start, each.stream))
            real = batch.real_rows(len(x))
            sums[each.name].add(x[real], (wanted[each.join.outputs[0]].reshape(-1, each.width) - base)[real])
    return {name: _substitutes(equations) for name, equations in sums.items()}


def _substitutes(sums: NormalEquations) -> dict[str, Substitute]:
    sums.flush()
    width, rows = sums.cross.shape[1], sums.gram[-1, -1]
    mean_x, mean_y = sums.gram[-1, :-1] / rows, sums.cross[-1] / rows
    fit = sums.solve(_RIDGE)
    # The outputs of a map of low rank lie in the directions in which those of the full map vary most.
    centred = sums.gram[:-1, :-1] / rows - np.outer(mean_x, mean_x)
    rank = max(width // THIN, 1)
    _, axes = linalg.eigh(fit.weights.T @ centred @ fit.weights, subset_by_index=(width - rank, width - 1))
    thin = (fit.weights @ axes, axes.T)
    return {
        "nothing": Substitute(),
        "constant": Substitute(bias=mean_y),
        "thin map": Substitute(thin, mean_y - mean_x @ thin[0] @ thin[1]),
        "map": Substitute((fit.weights,), fit.bias),
    }


def site_names(sublayer: Sublayer, anatomy: Anatomy) -> tuple[str, ...]:
    """Names of the sites inside, such as ``layer.3.ffn``, directions inside heads last; that of the sublayer where it has none."""
    inside = [site for site in anatomy.sites if site.consumers[0].leaf.node.index in sublayer.nodes]
    return tuple(site.name for site in sorted(inside, key=lambda site: site.kind in DEPTHS)) or (sublayer.name,)
