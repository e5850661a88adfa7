"""Can a kernel run a proven site here, and is the kernel expected to be faster than Inductor's? If not, why?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch._inductor import config
from torch.fx import Node

from dit_kernels import tuning
from dit_kernels.arguments import ROW, known, known_equal
from dit_kernels.families.family import Call
from dit_kernels.ops import checked_call, kernels_missing, prepare, run
from fusion_pass.dataflow import PARTS, aten, is_call, is_joined, is_pointwise, same_shape, under_views, value
from fusion_pass.refusal import Reason, Refused
from fusion_pass.site import Site


def prepared(site: Site) -> Site:
    """The site with the configuration of its kernel, which is compiled while Inductor compiles, too. So no forward pass
    waits for the kernel. Raises Refused where no kernel can run, where PyTorch's own kernels are expected to be faster,
    or where the kernel does not compile. The other sites are still fused."""
    call = check(site)
    chosen = _configured(site, call)
    try:
        prepare(call if chosen is site else _call(chosen))
    except Exception as error:
        reason = Reason.NO_KERNEL if chosen is site else Reason.MATMUL  # then a smaller site may have a kernel
        raise Refused(reason, site.anchor, f"{type(error).__name__}: {error}", site.kind) from error
    return chosen


def check(site: Site) -> Call:
    """The call of the op that the site becomes, on fake tensors. Raises Refused where no kernel can run the call, or
    where Inductor's own kernel is expected to be faster."""
    x = value(site.shaped())
    assert x is not None
    missing = kernels_missing(x.device)
    if missing is not None:
        raise Refused(Reason.NO_KERNEL, site.x, missing, site.kind)
    call = _call(site)
    missing = call.op.family.missing(x.device)
    if missing is not None:
        raise Refused(Reason.MATMUL, site.anchor, missing, site.kind)
    if not call.fits_kernel() or not _fits_its_place(site, call.op.family.grain):
        raise Refused(Reason.UNFIT, site.anchor, kind=site.kind)
    for name, argument in site.roles.items():
        source = site.source(name)
        if source is None:
            continue
        if argument.inlined and _is_computed_per_token(source, x):
            raise Refused(Reason.PER_TOKEN, source, kind=site.kind)
        # The model has expanded a row, such as a shift, to the size of x. Inductor reads the small tensor.
        if argument.role is ROW and is_call(under_views(source), aten.expand.default):
            raise Refused(Reason.PER_TOKEN, source, kind=site.kind)
    return call


def _call(site: Site) -> Call:
    return checked_call(site.target(), *(site.read(name) for name in site.roles), **site.keywords())


def _configured(site: Site, call: Call) -> Site:
    """The site with the configuration that was measured to be the fastest, if its family has several. Raises Refused
    where PyTorch's own kernels are as fast."""
    try:
        problem = call.op.family.problem(call, thorough=config.max_autotune or config.max_autotune_gemm)
        if problem is None:
            return site
        choice = tuning.choice(problem, call.first.device, run)
    except Exception as error:  # tuning.NotMeasured, or whatever a GPU may raise: PyTorch's own kernels still run
        raise Refused(Reason.MATMUL, site.anchor, f"not measured: {error}", site.kind) from error
    if choice.configuration is None:
        raise Refused(Reason.MATMUL, site.anchor, choice.why, site.kind)
    options = {**site.options, "configuration": choice.configuration}
    return replace(site, options=options, remark=site.remark or f"{choice.configuration}, {choice.why}")


def _fits_its_place(site: Site, grain: int) -> bool:
    """Does every row of a result that is a part of a joined tensor start at a multiple of `grain` elements?"""
    joined = (next(iter(node.users)) for node in site.results() if grain > 1 and is_joined(node))
    parts = [value(part) for cat in joined for part in cat.args[0]]
    return all(part is not None and known(part.shape[-1] % grain == 0) for part in parts)


def _is_computed_per_token(source: Node, x: torch.Tensor) -> bool:
    """Would Inductor compute this operand of x's size inside its kernel, while the op must read it from memory?

    Such a site is left to Inductor. On an H200 (D=3840, bf16, B=1 and 2, 1056 and 4128 tokens), Inductor's one kernel
    takes 0.6 to 0.84 of the time that it takes to write gate and scale to memory and then to call the op
    (kernels/benchmarks/results/h200_per_token.json, by bench_per_token.py).
    """
    val = value(source)
    if val is None or val.ndim < x.ndim or not is_pointwise(_whole(source)):
        return False
    if not any(known_equal(size, 1) for size in val.shape[-2:]):
        return True
    return same_shape(val, x) and not all(known_equal(size, 1) for size in val.shape[:-1])  # tokens first: [S, 1, D]


def _whole(node: Any) -> Any:
    """The tensor that a node is a part or a view of."""
    while True:
        node = under_views(node)
        if not is_call(node, *PARTS):
            return node
        node = node.args[0]
