"""What kernels are compiled for, written by hand: the families' tensors by their names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dit_kernels.compile import Variant
from dit_kernels.cute.spec import TensorSpec
from dit_kernels.families.family import Family


def variant(family: Family, chain: Any, d: int, **specs: TensorSpec | None) -> Variant:
    """A kernel of a family; tensors that are not named are absent."""
    assert specs.keys() <= family.named.keys()
    return Variant(family, chain, d, tuple(specs.get(argument.name) for argument in family.tensors))


def with_specs(of: Variant, **specs: TensorSpec | None) -> Variant:
    """The same with other tensors."""
    return replace(of, specs=variant(of.family, of.chain, of.d, **{**of.named, **specs}).specs)
