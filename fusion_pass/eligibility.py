"""May a proven site run on a kernel here, and does it pay? A reason when not."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from dit_kernels.ops import checked_call, kernels_missing, prepare
from fusion_pass.dataflow import PARTS, aten, is_call, is_pointwise, known_equal, same_shape, under_views, value
from fusion_pass.report import Reason, Refused
from fusion_pass.sites.site import Site


def check(site: Site, rounding: str) -> None:
    """Raises Refused where no kernel can run the site, or where Inductor's own kernel is expected to be better.

    rounding: "model" or "fp32". Compiles the kernel, while Inductor compiles too, so that no forward pass waits for it.
    """
    x = value(site.shaped())
    assert x is not None
    missing = kernels_missing(x.device)
    if missing is not None:
        raise Refused(Reason.NO_KERNEL, site.x, missing, site.kind)
    vals, keywords = _vals(site), site.keywords(rounding)
    if not checked_call(site.op(), *vals, **keywords).fits_kernel():
        raise Refused(Reason.UNFIT, site.anchor, kind=site.kind)
    for name in ("gate", "scale", "a", "b"):
        source = site.source(name)
        if source is not None and _is_computed_per_token(source, x):
            raise Refused(Reason.PER_TOKEN, source, kind=site.kind)
    residual = site.source("residual")
    if residual is not None and is_call(under_views(residual), aten.expand.default):
        raise Refused(Reason.PER_TOKEN, residual, kind=site.kind)  # a shift, which was made as large as x
    try:
        prepare(site.op(), *vals, **keywords)
    except Exception as error:  # one kernel does not compile: the other sites need not suffer
        raise Refused(Reason.NO_KERNEL, site.anchor, f"{type(error).__name__}: {error}", site.kind) from error


def _vals(site: Site) -> list[Any]:
    """What the op will be called with, as fake tensors."""
    arguments = [argument.name for argument in site.op()._schema.arguments if not argument.kwarg_only]
    return [site.read(name) for name in arguments]


def _is_computed_per_token(source: Node, x: torch.Tensor) -> bool:
    """An operand of x's size that Inductor would have computed inside its kernel, and that the op must read.

    Such a site is left to Inductor. On an H200 (D=3840, bf16, B=1 and 2, 1056 and 4128 tokens) its one kernel takes 0.6
    to 0.84 of the time that it takes to write gate and scale and then to call the op
    (kernels/benchmarks/results/h200_per_token.json, by bench_per_token.py).
    """
    val = value(source)
    if val is None or val.ndim < x.ndim or not is_pointwise(_whole(source)):
        return False
    if not any(known_equal(size, 1) for size in val.shape[-2:]):
        return True
    return same_shape(val, x) and not all(known_equal(size, 1) for size in val.shape[:-1])  # tokens first: [S, 1, D]


def _whole(node: Any) -> Any:
    """What a node is a part or another shape of."""
    while True:
        node = under_views(node)
        if not is_call(node, *PARTS):
            return node
        node = node.args[0]
