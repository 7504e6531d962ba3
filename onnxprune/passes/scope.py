"""What the user asked for, and the part of the model it concerns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from onnxprune.calibration.data import CalibrationData
from onnxprune.calibration.objective import LossSource, Objective, Purpose, choose_objective
from onnxprune.errors import InputError, NothingPrunable, Refusal
from onnxprune.graph.anatomy import Anatomy, Site, study
from onnxprune.graph.canonical import canonicalise, check_prunable
from onnxprune.graph.depth import DEPTHS, with_depths
from onnxprune.graph.layers import find_sublayers
from onnxprune.graph.model import Model
from onnxprune.graph.profile import take_profile
from onnxprune.graph.turning import Bases
from onnxprune.graph.vocabulary import VocabMap, cut_vocabulary
from onnxprune.passes.base import RewritePass, WholePass, WidthPass, ordered, select
from onnxprune.passes.hidden import Narrowed, narrow_streams
from onnxprune.passes.int8 import Int8Choice
from onnxprune.passes.layers import Shallow, site_names
from onnxprune.passes.tokens import TokenPolicy
from onnxprune.passes.vocab import Reduction, choose_vocabularies
from onnxprune.passes.workbench import Recipe
from onnxprune.runtime.session import RuntimeOptions
from onnxprune.search.target import Target


@dataclass(frozen=True)
class Settings:
    """What the user asked for, in the words of the command line."""

    passes: tuple[str, ...]
    target: Target
    keep: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    samples: int = 1024
    max_drop: float | None = None
    output: str | None = None
    loss: LossSource = "sampled"
    recipe: Recipe = field(default_factory=Recipe)
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    input_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    purpose: Purpose | None = None
    finishing: bool = True
    int8: Int8Choice = "auto"
    keep_ids: Path | None = None
    vocab_map: VocabMap = "graph"
    token_policy: TokenPolicy = "auto"
    protect_classes: bool = False
    hidden_keep: float = 0.75
    tokenizer: Path | None = None

    def may_time(self, model: Model) -> bool:
        """Whether whole sessions of ``model`` may be open side by side: not of a large one, unless milliseconds are what was asked for."""
        return not model.paged or self.target.quantity == "latency"


@dataclass(frozen=True, eq=False)
class Study:
    """The model understood: canonical graph, sites in the scope of the passes, refusals.

    ``rewrites`` are the passes asked for that change the finished graph, ``integers``, ``tokens``, ``polish`` and ``layers`` whether these
    are. ``words`` says which rows of word tables went, ``streams`` how residual streams became narrower, ``shallow`` what sublayers were
    replaced by, and ``whole`` is the canonical graph before all that. ``bases`` are turns inside heads that ``anatomy`` has taken, none
    before the search has looked at data.
    """

    given: Model
    anatomy: Anatomy
    sites: tuple[Site, ...]
    rewrites: tuple[str, ...]
    integers: bool
    refusals: tuple[Refusal, ...]
    whole: Model
    words: Reduction = field(default_factory=Reduction)
    bases: Bases = field(default_factory=dict)
    tokens: bool = False
    streams: Narrowed | None = None
    polish: bool = False
    layers: bool = False
    shallow: Shallow | None = None

    @property
    def smaller(self) -> bool:
        """Whether the model has lost something before the search began."""
        return bool(self.words.vocabularies or self.narrower or self.shallow)

    def refused(self, refusal: Refusal, *, others: bool) -> Refusal:
        """The refusal, as a pass does not do its part; ``others`` than units, rewrites and what is smaller already do theirs.

        Raises:
            NothingPrunable: there is nothing else to do.
        """
        if not (others or self.sites or self.rewrites or self.smaller):
            raise NothingPrunable(str(refusal))
        return refusal

    @property
    def narrower(self) -> bool:
        """Whether residual streams have another basis than in the file as given."""
        return bool(self.streams and self.streams.narrowings)


def understand(
    given: Model,
    settings: Settings,
    samples: Mapping[str, np.ndarray] | None = None,
    corpus: CalibrationData | None = None,
    data: CalibrationData | None = None,
) -> Study:
    """Canonicalise, cut word tables, find sites, apply the passes' scope and the keep/exclude patterns.

    Args:
        samples: real inputs, for models that do not run on made-up ones.
        corpus: rows whose token ids keep their embeddings; None where the data means nothing.
        data: rows that decide, for passes that look at activations before the search.

    Raises:
        InputError: a pattern matches nothing, an unknown pass, a model in a form that cannot be pruned.
        NothingPrunable: no site of the kinds asked for.
    """
    check_prunable(given)
    passes = select(settings.passes)
    widths = [item for item in passes if isinstance(item, WidthPass)]
    rewrites = ordered(item.name for item in passes if isinstance(item, RewritePass))
    asked = {item.kind for item in passes if isinstance(item, WholePass)}
    integers, tokens = "integers" in asked, "tokens" in asked
    if integers and (others := [name for name in rewrites if name in ("int4", "fp16")]):
        raise InputError(
            f"--passes names int8 and {others[0]}, which put the same weights into different numbers; "
            "take int8 for CPUs, fp16 for GPUs, int4 for large decoders"
        )
    canonical, profile = canonicalise(given, samples)
    whole, words = canonical, Reduction()
    if "words" in asked:
        words = choose_vocabularies(whole, corpus, settings.keep_ids, settings.vocab_map)
        if not (words.vocabularies or widths or rewrites or asked & {"integers", "tokens", "layers"}):
            raise NothingPrunable("\n  ".join(["nothing to prune for vocab:", *map(str, words.refusals)]))
        canonical = cut_vocabulary(whole, words.vocabularies)
        profile = take_profile(canonical, samples) if words.vocabularies else profile
    kinds = {item.kind for item in widths}
    anatomy = study(canonical, profile)
    streams = None
    if "hidden" in asked:
        if data is None:
            raise InputError("hidden chooses its directions by data: give real data with --calib")
        objective = choose_objective(anatomy, settings.output, data.labels, settings.purpose)
        streams = narrow_streams(canonical, profile, data, objective, settings.hidden_keep, settings.runtime, samples)
        if not (streams.narrowings or words.vocabularies or widths or rewrites or asked & {"integers", "tokens", "layers"}):
            raise NothingPrunable("\n  ".join(["nothing to prune for hidden:", *map(str, streams.refusals)]))
        anatomy = study(streams.model, streams.profile) if streams.narrowings else anatomy
    if kinds & set(DEPTHS):
        anatomy = with_depths(anatomy, kinds)
    found = [site for site in anatomy.sites if site.kind in kinds]
    sublayers = find_sublayers(anatomy.view, anatomy.profile) if "layers" in asked and not anatomy.model.paged else ()
    sites = _scope(found, settings, [name for sublayer in sublayers for name in site_names(sublayer, anatomy)])
    refusals = (
        *(refusal for refusal in anatomy.refusals if _concerns(refusal, kinds)),
        *words.refusals,
        *(streams.refusals if streams else ()),
    )
    if found and not sites:
        raise NothingPrunable(f"nothing to prune: --keep and --exclude protect all {len(found)} sites of {', '.join(sorted(kinds))}")
    if widths and not sites:
        raise NothingPrunable(_nothing(given, anatomy, kinds, refusals))
    return Study(
        given,
        anatomy,
        tuple(sites),
        rewrites,
        integers,
        refusals,
        whole,
        words,
        tokens=tokens,
        streams=streams,
        polish="polish" in asked,
        layers="layers" in asked,
    )


def of_shallow(study_: Study, shallow: Shallow) -> Study:
    """The study of the same model with fewer sublayers; what was out of the scope stays out of it."""
    kinds = {site.kind for site in study_.sites}
    anatomy = study(shallow.model, shallow.profile)
    if kinds & set(DEPTHS):
        anatomy = with_depths(anatomy, kinds)
    inside = {(site.kind, site.consumers[0].leaf.node.name) for site in study_.sites}
    sites = tuple(site for site in anatomy.sites if (site.kind, site.consumers[0].leaf.node.name) in inside)
    return replace(study_, anatomy=anatomy, sites=sites, shallow=shallow)


def leading_to(study_: Study, objective: Objective) -> Study:
    """The study with the sites on which the preserved output depends; others are refused, as nothing would speak for them.

    Raises:
        NothingPrunable: none of the sites leads there.
    """
    behind = study_.anatomy.view.ancestors([objective.tensor])
    sites = tuple(site for site in study_.sites if any(consumer.leaf.node.index in behind for consumer in site.consumers))
    reason = f"output {objective.output}, which is to be preserved, does not depend on it"
    others = tuple(Refusal(_OTHER_OUTPUT.get(site.kind, "OP110"), site.name, reason) for site in study_.sites if site not in sites)
    if others and not sites:
        raise NothingPrunable("\n  ".join([f"nothing to prune leads to output {objective.output}:", *map(str, others)]))
    return replace(study_, sites=sites, refusals=(*study_.refusals, *others))


_OTHER_OUTPUT = {"ffn": "OP206", "channels": "OP305"}

_KINDS: Mapping[str, set[str]] = {"1": {"heads", *DEPTHS}, "2": {"ffn"}, "3": {"channels"}}
"""Width passes by the first digit of their refusals."""


def _concerns(refusal: Refusal, kinds: set[str]) -> bool:
    return refusal.code[2] not in _KINDS or bool(_KINDS[refusal.code[2]] & kinds)


def _nothing(given: Model, anatomy: Anatomy, kinds: set[str], refusals: tuple[Refusal, ...]) -> str:
    counts: dict[str, int] = {}
    for node in anatomy.view.nodes:
        counts[node.op] = counts.get(node.op, 0) + 1
    common = ", ".join(f"{count} {op}" for op, count in sorted(counts.items(), key=lambda item: -item[1])[:6])
    found = f"the graph has {len(anatomy.view.nodes)} nodes ({common})"
    others = sorted({site.kind for site in anatomy.sites} - kinds)
    more = f"; it does have {', '.join(others)} sites: add them to --passes" if others else ""
    reasons = "".join(f"\n  {refusal}" for refusal in refusals)
    wanted = sorted(kinds)
    blocks = [f"a transformer block's {' or '.join(kind for kind in wanted if kind != 'channels')}"] if kinds - {"channels"} else []
    blocks += ["channels of convolutions that can be cut"] if "channels" in kinds else []
    return f"nothing to prune for {', '.join(wanted)}: {found} and none of it is {' or '.join(blocks)}{more}{reasons}"


def _scope(sites: list[Site], settings: Settings, sublayers: Sequence[str] = ()) -> list[Site]:
    """``--keep`` protects sites, ``--exclude`` does too: both are patterns on names of sites and sublayers; each must match."""
    names = tuple(dict.fromkeys([*(site.name for site in sites), *sublayers]))
    protected: set[str] = set()
    for option, patterns in (("--keep", settings.keep), ("--exclude", settings.exclude)):
        for pattern in patterns:
            try:
                matched = {name for name in names if re.search(pattern, name)}
            except re.error as error:
                raise InputError(f"{option} {pattern!r} is not a regular expression: {error}") from error
            if not matched and names:
                raise InputError(f"{option} {pattern!r} matches no site; sites are named like {names[0]} (see onnxprune inspect)")
            protected |= matched
    return [site for site in sites if site.name not in protected]
