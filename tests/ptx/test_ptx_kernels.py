"""The compiled kernels, run from their PTX, against the definition: the bounds are those of a GPU."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from itertools import product

import kernel_bounds as bounds
import pytest
import torch
from kernel_bounds import random

pytest.importorskip("cutlass", reason="CuTeDSL (nvidia-cutlass-dsl) is not installed")

from dit_kernels.rounding import FORMS, NORMS, ROOTS
from ptx import numbers
from ptx.device import UNLIKE, gpu, in_turn
from ptx.judging import check

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
WIDTHS = (2304, 2520, 3840, 4608, 8192)


@pytest.mark.parametrize(("arch", "op", "d"), in_turn(product(bounds.OPS, (*WIDTHS, 7, 2521))))
def test_every_op_follows_the_definition(arch: str, op: str, d: int) -> None:
    with gpu(arch, 1):
        check(op, bounds.operands(2, 3, d))


@pytest.mark.parametrize(("arch", "form", "norm"), in_turn(product(FORMS, NORMS)))
def test_the_dual_follows_the_definition_in_every_rounding_form(arch: str, form: str, norm: str) -> None:
    """Also whichever way approximations err."""
    for approximations in (nullcontext(), numbers.perturbed(-1), numbers.perturbed(1)):
        with gpu(arch, 1), approximations:
            check(bounds.DUAL, bounds.operands(1, 7, 3840), rounding=form, norm=norm)


@pytest.mark.parametrize(("arch", "root", "form"), in_turn(product(ROOTS[1:], ("cast_then_weight", "native"))))
def test_every_spelling_of_the_root_follows_the_definition(arch: str, root: str, form: str) -> None:
    with gpu(arch, 1):
        check(bounds.DUAL, bounds.operands(1, 7, 2304), root=root, rounding=form)
        check(bounds.DUAL, bounds.operands(1, 7, 2304, FP32), root=root, rounding=form)


@pytest.mark.parametrize("arch", UNLIKE)
@pytest.mark.parametrize("walk", ("token", "element"))
def test_a_gate_per_token_and_one_of_one_element_follow_the_definition(arch: str, walk: str) -> None:
    o = bounds.operands(2, 3, 2304)
    shape = (2, 3, 2304) if walk == "token" else (1, 1, 1)
    with gpu(arch, 1):
        check(bounds.DUAL, replace(o, gate=random(*shape, seed=1), scale=random(*shape, seed=2)))


@pytest.mark.parametrize("arch", UNLIKE)
def test_a_row_too_wide_for_the_registers_follows_the_definition(arch: str) -> None:
    with gpu(arch, 1):
        check(bounds.DUAL, bounds.operands(1, 2, 32768))


@pytest.mark.parametrize("arch", UNLIKE)
def test_ctas_that_walk_many_rows_and_those_that_take_the_rest_cover_every_row(arch: str) -> None:
    with gpu(arch, 1):
        check(bounds.DUAL, bounds.operands(2, 29, 2304))


@pytest.mark.parametrize("arch", UNLIKE)
def test_offsets_pass_2_to_the_31_elements(arch: str) -> None:
    o = bounds.operands(2, 3, 3840)
    far = torch.empty_strided(o.x.shape, (2**31 + 64, 3840, 1), dtype=BF16)
    with gpu(arch, 1):
        check(bounds.DUAL, replace(o, x=far.copy_(o.x)))
