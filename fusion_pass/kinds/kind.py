"""The protocols of a value and of a kind of site, and the registry of both.

A value is found from one node, its anchor: a norm from its root, a silu from its exponential or sigmoid. A kind follows
the readers of a value and finds the site that the value belongs to.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch.fx import Graph, Node

from fusion_pass.refusal import Reason
from fusion_pass.site import Site


class Survey:
    """The notes that kinds make about the whole graph before the first rewrite, so that their sites can find each
    other."""

    def __init__(self) -> None:
        self._notes: defaultdict[str, dict[Node, Node]] = defaultdict(dict)

    def notes(self, kind: str) -> dict[Node, Node]:
        """The notes of a kind. The kind documents what their keys and values are."""
        return self._notes[kind]


class Found(Protocol):
    """A value that was found: computed from x, with the result `out`."""

    @property
    def x(self) -> Node: ...

    @property
    def out(self) -> Node: ...


V = TypeVar("V", bound=Found)
V_contra = TypeVar("V_contra", bound=Found, contravariant=True)


class Value(Protocol[V]):
    """A value that sites grow from.

    name: the name in the report, if no kind fuses the value. anchors: the targets of its anchors. is_modulated: do
    models gate and scale such values? If a graph has such values and gates, but no site, the pass warns. unfused: the
    reason in the report if no kind finds a site; None if the report should have no row for the value.
    """

    name: str
    anchors: tuple[Any, ...]
    is_modulated: bool
    unfused: Reason | None

    def find(self, anchor: Node) -> V | None:
        """The value of an anchor, or None if there is none. Raises Refused."""
        ...

    def measured(self, anchor: Node) -> Node:
        """The tensor that the report shows for an anchor: the value's x, or the anchor itself if no value is found."""
        found = self.find(anchor)
        return anchor if found is None else found.x

    def has_gates(self, graph: Graph) -> bool:
        """Does the graph seem to gate such values?"""
        return False

    def is_reported_elsewhere(self, found: V, survey: Survey) -> bool:
        """Is this value, which no kind fuses, a part of another value that is reported?"""
        return False


class Kind(Protocol[V_contra]):
    """A kind of site. name: the name of its op, also used in the report. is_modulated: as for a value."""

    name: str
    is_modulated: bool

    def note(self, value: V_contra, survey: Survey) -> None:
        """Notes what sites of this kind must know about each other. Called for each value before the first rewrite."""
        return

    def find(self, value: V_contra, survey: Survey) -> Site | None:
        """The site that a value belongs to according to the dataflow, or None if there is none. Raises Refused."""
        ...


@dataclass
class Entry:
    """A value, and the kinds that fuse it, in the order in which they are tried: the largest site first."""

    value: Value[Any]
    kinds: list[Kind[Any]] = field(default_factory=list)


class Registry:
    """Every value and every kind that the pass knows."""

    def __init__(self, *entries: Entry) -> None:
        self.entries = list(entries)

    def register(self, value: Value[Any], kind: Kind[Any]) -> None:
        """Adds a kind, which is tried before the other kinds of its value. Adds the value, too, if it is new."""
        entry = next((entry for entry in self.entries if entry.value is value), None)
        if entry is None:
            self.entries.append(entry := Entry(value))
        entry.kinds.insert(0, kind)

    def unregister(self, kind: Kind[Any]) -> None:
        """Removes a kind. Removes its value, too, if the value has no other kind."""
        for entry in self.entries:
            if kind in entry.kinds:
                entry.kinds.remove(kind)
                if not entry.kinds:
                    self.entries.remove(entry)

    def by_anchor(self) -> dict[Any, Entry]:
        """The entries whose values are fused, by the targets of their anchors."""
        return {target: entry for entry in self.entries if entry.kinds for target in entry.value.anchors}

    def only_reported(self) -> Iterator[Value[Any]]:
        """The values that no kind fuses by themselves."""
        return (entry.value for entry in self.entries if not entry.kinds)

    def unmodulated(self) -> set[str]:
        """The names, in the report, of the values and kinds that models neither gate nor scale."""
        values = {entry.value.name for entry in self.entries if not entry.value.is_modulated}
        return values | {kind.name for entry in self.entries for kind in entry.kinds if not kind.is_modulated}
