"""The kernels with a shift, and with a residual add without a norm, run from their PTX."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import adaln_kernel_bounds
import pytest
import quant_checks
import torch
from adaln_kernel_bounds import ADD, DUAL, SCALED, D, operands
from kernel_bounds import BF16, FP16, FP32

pytest.importorskip("cutlass", reason="CuTeDSL (nvidia-cutlass-dsl) is not installed")

from test_kernel_code import assert_fits

from dit_kernels import compile
from dit_kernels.cute import modulated_norm, stage
from dit_kernels.families import OPS
from ptx.device import compiled, gpu
from ptx.judging import LikeCuda, NormInterpreter


class AdaLNInterpreter(NormInterpreter):
    """Computes layer norms as a GPU does."""

    def eager(self) -> AbstractContextManager[Any]:
        return LikeCuda(layer_norms=True)


INTERPRETER = AdaLNInterpreter()
check = partial(adaln_kernel_bounds.check, INTERPRETER)

EVERY_OP = (("sm_80", ADD, "layer"), ("sm_90a", ADD, "layer"), ("sm_90a", SCALED, "layer"), ("sm_90a", DUAL, "rms"))


@pytest.mark.parametrize(("arch", "op", "norm"), EVERY_OP)
def test_a_shift_and_an_add_without_a_norm_follow_the_definition(arch: str, op: str, norm: str) -> None:
    """On sm_80, the next row waits in registers; on sm_90a, in shared memory."""
    with gpu(arch, 1):
        check(op, *operands(op, tokens=7), norm=norm)


SHAPES: tuple[tuple[int, ...], ...] = ((2, 3, D), (1,))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_modulations_broadcast_in_every_way(shape: tuple[int, ...]) -> None:
    with gpu("sm_90a", 1):
        check(ADD, *operands(ADD, shape=shape), norm="layer")


def test_wans_chain_in_fp32_rounds_y_and_z_once() -> None:
    options = dict(norm="layer", rounding="weight_then_cast", norm_dtype=FP32, y_dtype=BF16, z_dtype=BF16)
    with gpu("sm_90a", 1):
        check(ADD, *operands(ADD, modulation=FP32), **options)


def test_operands_may_be_absent_and_the_norm_affine() -> None:
    x, gate, residual, weight, bias, scale, eps, shift = operands(ADD, affine=True)
    with gpu("sm_90a", 1):
        check(ADD, x, None, residual, weight, bias, None, eps, norm="layer")
        check(ADD, x, gate, residual, weight, bias, scale, eps, shift, tanh=True, add_one=False)


@pytest.mark.parametrize(("dtype", "d"), ((FP16, 2521), (BF16, 32768)))
def test_other_dtypes_and_widths_follow_the_definition(dtype: torch.dtype, d: int) -> None:
    """Rows of an odd number of elements have no bulk copies. The widest rows are read again in each pass."""
    with gpu("sm_90a", 1):
        check(ADD, *operands(ADD, tokens=1, d=d, dtype=dtype), norm="layer")


def test_q_and_s_are_those_of_z() -> None:
    quantised = partial(quant_checks.check, INTERPRETER)
    *given, shift = operands(ADD, tokens=7)
    with gpu("sm_90a", 1):
        quantised(f"{ADD}_quant", *given, shift, norm="layer")
        quantised(f"{ADD}_quant.static_keep_z", *given, torch.tensor(0.0137), shift, norm="layer")
        quantised(f"{SCALED}_quant", *operands(SCALED, tokens=7), norm="layer")


RESOURCES = (("sm_80", ADD, 3072), ("sm_90a", f"{DUAL}_quant", 3840), ("sm_90a", ADD, 5120), ("sm_120a", ADD, 6144))


@pytest.mark.parametrize(("arch", "op", "d"), RESOURCES)
def test_nothing_spills_and_as_many_ctas_fit_as_are_launched(arch: str, op: str, d: int) -> None:
    """Each kernel has every operand, but the one of 5120 elements: it has Wan's, with modulations in fp32."""
    given = operands(op.removesuffix("_quant"), d=d, modulation=FP32 if d == 5120 else BF16, affine=d != 5120)
    call = OPS[op].call(*given, norm="layer", **(dict(y_dtype=BF16, z_dtype=BF16) if d == 5120 else {}))
    with gpu(arch, 1, lambda _, variant: variant):
        variant, _ = compile.bound(call.op.family, call.chain, call.operands(call.empty_results()))
    assert_fits(arch, variant)


# --- mistakes: each is found ----------------------------------------------------------------------------------------


def shift_left_out(original, parameters, *others):  # type: ignore[no-untyped-def]
    original(parameters, *others)
    parameters.terms[1] = None


def shift_of_another_batch_item(original, parameters, kernel, operands, place):  # type: ignore[no-untyped-def]
    original(parameters, kernel, operands, place)
    elsewhere = replace(place, batch=1 - place.batch)
    parameters.terms[1] = stage.Reader.of(operands["shift"], kernel.specs["shift"], elsewhere, True)


def residual_left_out(original, kernel, place, rows, *others):  # type: ignore[no-untyped-def]
    original(kernel, place, {**rows, "residual": rows["x"]}, *others)


def tanh_of_the_gate(original, of, *others):  # type: ignore[no-untyped-def]
    return original(replace(of, activation="tanh") if of.names.out == "y" else of, *others)


def _without_rounding(result: str, original, of, *others):  # type: ignore[no-untyped-def]
    wrong = replace(of, steps=replace(of.steps, product=torch.float32))
    return original(wrong if of.names.out == result else of, *others)


def product_of_y_not_rounded(original, *others):  # type: ignore[no-untyped-def]
    return _without_rounding("y", original, *others)


def product_of_z_not_rounded(original, *others):  # type: ignore[no-untyped-def]
    return _without_rounding("z", original, *others)


MISTAKES: tuple[tuple[Any, str, Callable[..., Any], str], ...] = (
    (modulated_norm._Parameters, "__init__", shift_left_out, "off by|differ"),
    (modulated_norm._Parameters, "__init__", shift_of_another_batch_item, "off by|differ"),
    (modulated_norm.ModulatedNormKernel, "run", residual_left_out, "^y"),
    (modulated_norm, "factor_of", tanh_of_the_gate, "^y"),
    (modulated_norm, "write", product_of_y_not_rounded, "^y"),
    (modulated_norm, "write", product_of_z_not_rounded, "off by|differ"),
)


@pytest.mark.parametrize(
    ("owner", "name", "wrong", "message"), MISTAKES, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_mistake_is_found(owner: Any, name: str, wrong: Callable[..., Any], message: str) -> None:
    original = getattr(owner, name)

    def replaced(*arguments: Any, **options: Any) -> Any:
        return wrong(original, *arguments, **options)

    mistaken = mock.patch.object(owner, name, replaced)
    with mistaken, gpu("sm_90a", 1, compiled.__wrapped__), pytest.raises(AssertionError, match=message):
        check(ADD, *operands(ADD))
