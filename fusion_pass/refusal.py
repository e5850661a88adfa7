"""Why something in a graph was not fused."""

from __future__ import annotations

from enum import Enum
from typing import Any

from torch.fx import Node


class Reason(str, Enum):
    """Why something in the graph was not fused. Later versions may add members."""

    ALONE = "no residual add, scale or rotation that the pass knows is the only reader of the norm"
    FOLLOWED = "other operations follow the scale; Inductor computes all of them in one kernel"
    LAYER_NORM = "a LayerNorm that is not written as F.layer_norm"
    DIMENSION = "the mean runs over other dimensions than the last one"
    NOT_NORMALISED = "the value that is squared is not the value that is normalised"
    MEAN = "the value under the root is not mean(x²) + eps as torch.mean computes it"
    ROOT = "eps or a factor is applied to the root, not to the value under the root"
    ESCAPES = "a value inside the site is also read outside the site"
    KINDS = "the two norms of the site differ in their kind, rms or layer, or in how they compute the root"
    ROUNDING = "the casts fit no rounding form"
    WIDTH = "the size of the last dimension is not a constant"
    SHAPE = "the shapes are not known to be equal or to broadcast"
    DTYPE = "the ops do not take a dtype of the site"
    DEVICE = "the operands are on different devices"
    EPS = "eps is neither a constant >= 0 nor a 0-d floating-point tensor on the CPU"
    ORDER = "an operand of the site is computed from a result of the site"
    LAYOUT = "the op returns contiguous tensors, and the graph would see another memory layout"
    APART = "the rows lie apart in memory, as those of images between convolutions do, and Inductor needs no copy"
    MUTATION = "a mutation or a switch of streams lies between the nodes of the site"
    TRAINING = (
        "a training graph: its backward reads the values inside the site. Where no gradient is wanted, run the model "
        "under torch.no_grad() or torch.inference_mode()"
    )
    UNNORMED = "the rotated tensor is not an RMSNorm or LayerNorm of each head"
    HEADS = "the rotated tensor is not [B, S, H, Dh], or the rotation is not one row for each token and all heads"
    ROTATION = "a rotation in a spelling that no kernel computes"
    ADDED = "what is added to the residual is not a norm, and the add is not fused with a norm that reads the sum"
    QUANTISER = "a quantiser to FP8 follows that no op computes"
    MATMUL = "the matmul in front of the activation is left as it is"
    INLINE = "Inductor computes the value in the kernel that reads it, or writes it into the result of a concatenation"
    SILU = "a silu that is not written as F.silu and that rounds differently"
    PER_TOKEN = "Inductor computes a per-token operand inside its own kernel"
    NO_KERNEL = "no kernel can run here"
    UNFIT = "no kernel takes these dtypes and sizes"
    ERROR = "an internal error of the pass; nothing was changed"


# Nothing that the pass fuses, or left to Inductor on purpose: no warning for it, and no error under strict=True.
BY_DESIGN = frozenset(
    {
        Reason.ALONE,
        Reason.FOLLOWED,
        Reason.LAYER_NORM,
        Reason.DIMENSION,
        Reason.NOT_NORMALISED,
        Reason.MEAN,
        Reason.ROOT,
        Reason.KINDS,
        Reason.PER_TOKEN,
        Reason.APART,
        Reason.UNNORMED,
        Reason.HEADS,
        Reason.ROTATION,
        Reason.ADDED,
        Reason.QUANTISER,
        Reason.MATMUL,
        Reason.INLINE,
        Reason.SILU,
        Reason.UNFIT,
    }
)


class Refused(Exception):
    """Raised for something that looks like a site and is not fused, with the reason."""

    def __init__(self, reason: Reason, node: Node | None = None, detail: str = "", kind: str | None = None) -> None:
        self.reason, self.node, self.detail, self.kind = reason, node, detail, kind
        self.site: Any = None  # the site.Site, if one was found and then not proven or not eligible
        super().__init__(self.text())

    def why(self) -> str:
        """The reason and its detail."""
        return self.reason.value + (f" ({self.detail})" if self.detail else "")

    def text(self) -> str:
        """The reason, its detail and the name of the node."""
        return f"{self.why()}, at {self.node.name}" if self.node is not None else self.why()
