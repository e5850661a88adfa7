"""A family of ops in one file: relu_mul, relu(a) * b + bias. See CONTRIBUTING.md; test_structure.py registers it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_kernels.arguments import COLUMN, ROW, Argument, Option, dtype_option
from dit_kernels.families.family import Family, Named, Op, Shaped


@dataclass(frozen=True)
class ReluChain:
    """relu(a) * b + bias, rounded to a dtype."""

    out: torch.dtype


class ReluMul(Family):
    """relu(a) * b + bias. a and b: [..., S, D]; bias: [D], None, or left out."""

    arguments = (
        Argument("a", ROW, inlined=True),
        Argument("b", ROW, inlined=True),
        Argument("bias", COLUMN, optional=True, defaulted=True),
        Argument("out", ROW, written=True),
    )

    def chain(self, op: Op, named: Named, options: Named) -> ReluChain:
        return ReluChain(options["out_dtype"] or torch.promote_types(named["a"].dtype, named["b"].dtype))

    def results(self, chain: ReluChain, named: Named) -> tuple[Shaped, ...]:
        return ((named["a"].shape, chain.out),)

    def definition(self, chain: ReluChain, named: Named) -> tuple[Tensor, ...]:
        product = named["a"].relu() * named["b"]
        return ((product if named["bias"] is None else product + named["bias"]).to(chain.out),)


_ROUNDING = Option("rounding", "str", "model", ("model", "fp32"))  # one product: both round it once
RELU_MUL = Op("relu_mul", ReluMul(), ("a", "b", "bias", "out"), (_ROUNDING, dtype_option("out_dtype")))
