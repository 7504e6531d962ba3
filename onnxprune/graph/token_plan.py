"""Which tokens leave where, as a plan that can be stored and carried out again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from onnxprune.errors import InputError

Policy = Literal["drop", "package", "merge", "drop-merge", "static", "grid", "threshold"]
POLICIES: tuple[Policy, ...] = ("drop", "package", "merge", "drop-merge", "static", "grid", "threshold")
MERGING: frozenset[Policy] = frozenset({"merge", "drop-merge"})
"""Those that merge what is alike in each sample."""
RANKING: frozenset[Policy] = frozenset({"drop", "package", "drop-merge"})
"""Those that keep a number of tokens, whatever score ranks them."""


class CannotCut(InputError):
    """Something in the graph cannot follow when tokens leave, or the plan was made for another file."""


@dataclass(frozen=True)
class TokenCut:
    """At the tensor ``place``, behind the attention of the Softmax node ``softmax``, ``share`` of all tokens of a sample stay.

    ``block`` counts the places, from 0. ``positions``: where those that stay are among all tokens, rising; empty if samples decide it.
    ``threshold``: attention that a token must get, as a multiple of the mean over the tokens of its sample; None if a number of them stays.
    The share is then what stays on average. ``joins``: for every token there ever was, which of those behind the place it is part of; empty
    if samples decide it. ``predictor``: weights [C] on the unit features at the place, whose product with them is the
    score of a token; empty if it is the attention that the token gets.
    """

    place: str
    softmax: str
    share: float
    block: int
    positions: tuple[int, ...] = ()
    joins: tuple[int, ...] = ()
    threshold: float | None = None
    predictor: tuple[float, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value not in ((), None)}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> TokenCut:
        lists = {name: tuple(content.get(name, ())) for name in ("positions", "joins", "predictor")}
        if any(type(number) is not int for name in ("positions", "joins") for number in lists[name]):
            raise InputError(f"tokens of the plan at {content.get('place')!r} are not told by whole numbers; the plan is damaged")
        return cls(**{**content, **lists})


@dataclass(frozen=True)
class TokenPlan:
    """What becomes of tokens that leave, and where they do.

    ``drop``: nothing. ``package``: their mean is one more token, each cut its own (SPViT; EViT). ``merge``: the most similar pairs
    become one (ToMe). ``drop-merge``: one half leaves, the least attended; then similar pairs become one (after DiffRate).
    ``static``: nothing, and it is the same positions in every sample (Patch Slimming). ``grid``: neighbouring rows or columns of patches
    become one, the same in every sample, so that what is left is a grid again (after CAIT).
    ``threshold``: nothing, and each sample keeps as many tokens as get enough attention (LTP).
    """

    policy: Policy
    cuts: tuple[TokenCut, ...]

    @property
    def score(self) -> str:
        """What ranks tokens: ``attention``, ``predictor`` or, if nothing does, ``none``."""
        if self.policy in ("merge", "static", "grid"):
            return "none"
        return "predictor" if any(cut.predictor for cut in self.cuts) else "attention"

    def describe(self) -> str:
        """``70% stay behind attention 2, 49% behind 3``."""
        first, *rest = (f"{100 * cut.share:.0f}%{{}} behind {{}}{cut.block}" for cut in self.cuts)
        return ", ".join([first.format(" stay", "attention "), *(other.format("", "") for other in rest)])

    def as_dict(self) -> dict[str, Any]:
        return {"policy": self.policy, "cuts": [cut.as_dict() for cut in self.cuts]}

    def summary(self) -> dict[str, Any]:
        """As a report tells it: without the weights of predictors, and what joins what."""
        cuts = [replace(cut, joins=(), predictor=()).as_dict() for cut in self.cuts]
        return {"policy": self.policy, "score": self.score, "cuts": cuts}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> TokenPlan:
        if content["policy"] not in POLICIES:
            raise InputError(f"the plan has the token policy {content['policy']!r}; known: {', '.join(POLICIES)}")
        return cls(content["policy"], tuple(TokenCut.from_dict(cut) for cut in content["cuts"]))
