"""Adds the fusion pass to Inductor's hook for post-grad passes.

The hook holds one pass up to torch 2.12, and a sequence of passes from 2.13 on.
"""

from __future__ import annotations

from typing import Any

from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph


class OurPass(CustomGraphPass):
    """The base class of the fusion pass. Code can ask for it in the hook without importing the pass itself."""


def join(present: Any, fusion_pass: OurPass) -> Any:
    """The passes that the hook should hold: the passes of others that it holds already, then ours. Replaces a fusion
    pass that it holds."""
    others = [p for p in _passes(present) if not isinstance(p, OurPass)]
    if not others:
        return fusion_pass
    if hasattr(custom_graph_pass, "get_custom_graph_passes"):
        return (*others, fusion_pass)
    return _Chain(others[0], fusion_pass)


def holds_ours(present: Any) -> bool:
    """Is the fusion pass in the hook?"""
    return any(isinstance(p, OurPass) for p in _passes(present))


def _passes(present: Any) -> list[Any]:
    passes = present if isinstance(present, list | tuple) else [] if present is None else [present]
    return [single for p in passes for single in ((p.first, p.second) if isinstance(p, _Chain) else (p,))]


class _Chain(CustomGraphPass):
    """Two passes as one pass, for torch up to 2.12."""

    def __init__(self, first: Any, second: OurPass) -> None:
        self.first, self.second = first, second

    def __call__(self, graph: Graph) -> None:
        self.first(graph)
        self.second(graph)

    def uuid(self) -> Any | None:
        """None if one of the two passes has no uuid: Inductor then caches nothing, as it does for that pass alone."""
        uuids = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in (self.first, self.second)]
        return None if None in uuids else uuids

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Chain) and (self.first, self.second) == (other.first, other.second)

    def __hash__(self) -> int:
        return hash(self.second)
