"""Where an op for a shift, or for a residual add without a norm, is faster than Inductor: the rule and its numbers.

Microseconds on an H100 in bf16, of Inductor's kernel that computes y = residual + gate * x and norm(y) * (1 + scale) +
shift, and of a copy of the same bytes:

    result                     model              Inductor    copy
    16 bits                    Qwen-Image         32 and 42     33
                               FLUX.1             44 to 51      39
                               SD3.5 large        29 and 37     27
                               HunyuanVideo-1.5   325          177
    FP8, a scale for each row  FLUX.1             65 and 45     33

In 16 bits, most are near the speed of a copy. No op has been measured in their place in a model, so these sites are
left to Inductor. With a quantiser behind them, Inductor reads each row twice, and they are fused.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import Node

from fusion_pass.dataflow import is_pointwise, sole_user, under_views

IN_16_BITS = "Inductor computes this near the speed of a copy; no gain was measured"


def pays(quantises: bool, rows: Iterable[Node] = ()) -> bool:
    """Is an op with a shift, or with a residual add without a norm, fused here?

    quantises: does a quantiser read its z? rows: what a residual add reads. Inductor computes pointwise operations in
    front of an add in the kernel of the add. In front of an op, it would write their result to memory.
    """
    return quantises and not any(is_pointwise(row) and sole_user(row) is not None for row in map(under_views, rows))
