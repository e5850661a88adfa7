"""q, s = quantised(x) of rows that are in memory anyway, e.g. attention's output or the states of a text encoder.

Inductor computes what is pointwise in front of a quantiser in the quantiser's own kernel, and there is nothing to gain.
But it loads rows twice, first for their scale, even if they come from memory.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

from torch.fx import Node

from fusion_pass.dataflow import VIEWS, aten, hint, is_call, value
from fusion_pass.kinds import quantiser
from fusion_pass.kinds.kind import Kind, Survey, Value
from fusion_pass.refusal import Refused
from fusion_pass.site import Form, Operands, Output, Site, check_operands

# On an H100, Inductor's kernel takes 10.1 µs for 1056 rows of 3840 elements and 29.1 for 4128; a copy 8.5 and 20.7.
FEWEST_ROWS = 1024
MATMULS = (
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten._scaled_mm.default,
)


@dataclass(frozen=True)
class StoredRows:
    """Rows x in memory. out: their absolute values, whose largest ones a quantiser finds."""

    x: Node
    out: Node


class StoredRowsValue(Value[StoredRows]):
    """Rows in memory, found from their absolute values."""

    name = "rows"
    anchors = (aten.abs.default,)
    is_modulated = False
    unfused = None  # other kinds report quantisers that follow them

    def find(self, anchor: Node) -> StoredRows | None:
        """The rows whose absolute values `anchor` computes, if they are in memory; else None.

        The user's code, then its graph:

            self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

            o = getitem(_scaled_dot_product_flash_attention(q, k, v), 0); z = view(permute(o, [0, 2, 1, 3]), [B, S, D]);
            a = amax(abs(z), [-1], True); ...
        """
        rows = quantiser.before_same_rows(anchor.args[0])
        return StoredRows(rows, anchor) if _is_in_memory(rows) else None


STORED_ROWS = StoredRowsValue()


class Quant(Kind[StoredRows]):
    """q, s = quantised(x)."""

    name = "quant"
    is_modulated = False

    def find(self, value: StoredRows, survey: Survey) -> Site | None:
        """Finds the quantisers that read rows. kinds/quantiser.py has the code of the user and its graph."""
        rows = (value.x,)
        if not quantiser.follow(rows) or not _are_many(value.x):
            return None
        operands: Operands = {"x": value.x}
        try:
            check_operands(operands, self.name)
            found = quantiser.behind(rows, self.name)
        except Refused:
            return None  # nothing is fused here without a quantiser either
        if not found.s:
            return None  # a static scale, with which Inductor reads the rows once, too
        return Site(
            kind=self.name,
            operands=operands,
            options=found.options(),
            form=Form("model", {}),
            outputs=(Output(found.q), Output(found.s)),
            interior=found.interior,
            anchor=value.out,
            like=value.x,
            origin=value.x,
        )


def _is_in_memory(node: Node) -> bool:
    """Is a node a view of an input of the graph, or of what a kernel writes that is not Inductor's own?"""
    while is_call(node, *VIEWS):
        node = node.args[0]
    if is_call(node, operator.getitem):
        node = node.args[0]
    if node.op == "placeholder" or is_call(node, *MATMULS):
        return True
    name = str(node.target) if node.op == "call_function" else ""
    return name.startswith("aten._scaled_dot_product_") or (
        getattr(node.target, "namespace", "aten") not in ("aten", "prims")
    )


def _are_many(rows: Node) -> bool:
    """Are there enough rows? A symbolic size counts as it is at compile time, and an unknown one as large."""
    val = value(rows)
    return val is not None and math.prod(hint(size, FEWEST_ROWS) for size in val.shape[:-1]) >= FEWEST_ROWS
