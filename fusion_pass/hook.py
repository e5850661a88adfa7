"""Inductor's hook for post-grad passes holds one pass up to torch 2.12, and a sequence from 2.13 on."""

from __future__ import annotations

from typing import Any

from torch._inductor import custom_graph_pass
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

from fusion_pass.graph_pass import FusionPass


def join(present: Any, fusion_pass: FusionPass) -> Any:
    """What is in the hook already, then our pass; a FusionPass that is there already is replaced."""
    others = [p for p in _passes(present) if not isinstance(p, FusionPass)]
    if not others:
        return fusion_pass
    if hasattr(custom_graph_pass, "get_custom_graph_passes"):
        return (*others, fusion_pass)
    return _Chain(others[0], fusion_pass)


def holds_ours(present: Any) -> bool:
    """Is a FusionPass in the hook?"""
    return any(isinstance(p, FusionPass) for p in _passes(present))


def _passes(present: Any) -> list[Any]:
    passes = present if isinstance(present, list | tuple) else [] if present is None else [present]
    return [single for p in passes for single in ((p.first, p.second) if isinstance(p, _Chain) else (p,))]


class _Chain(CustomGraphPass):
    """Two passes in the place of one."""

    def __init__(self, first: Any, second: FusionPass) -> None:
        self.first, self.second = first, second

    def __call__(self, graph: Graph) -> None:
        self.first(graph)
        self.second(graph)

    def uuid(self) -> Any | None:
        """None, so that nothing is cached, where one of the two has none: as Inductor does for it alone."""
        uuids = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in (self.first, self.second)]
        return None if None in uuids else uuids

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Chain) and (self.first, self.second) == (other.first, other.second)

    def __hash__(self) -> int:
        return hash(self.second)
