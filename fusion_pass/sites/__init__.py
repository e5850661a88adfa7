"""The kinds of site: one module each, with `find(value, survey)`, which gives the site that a value belongs to.

A site grows from a value that one node, its anchor, stands for: a norm from its root, a silu from its exponential. The
module of a value has `ANCHORS`, `find(anchor)`, `measured(anchor)`, its `NAME` in the report, and the reason why it was
missed where no kind of site is found around it (`ALONE`; None where that is not worth a word). Kinds compose: `gated`
and `scaled` are what stands around one norm, `dual` is both; `rope` is a norm that is rotated, `qk_rope` two of them. A
kind whose sites look for each other has `note(value, survey)`, which is called for each value before the first rewrite.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from fusion_pass.sites import dual, gated, norm, qk_rope, rope, scaled, silu, silu_mul


@dataclass(frozen=True)
class Family:
    """A value, and the kinds of site that grow from it, in the order in which they are tried: the larger site first."""

    value: ModuleType
    kinds: tuple[ModuleType, ...]


FAMILIES = (
    Family(norm, (dual, gated, scaled, qk_rope, rope)),
    Family(silu, (silu_mul,)),
)
