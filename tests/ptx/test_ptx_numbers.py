"""The arithmetic of the interpreter, against torch, exact fractions and the PTX manual."""

from __future__ import annotations

import math
import struct
from fractions import Fraction
from typing import Any

import kernel_bounds as bounds
import numpy as np
import pytest
import torch

pytest.importorskip("cutlass", reason="CuTeDSL (nvidia-cutlass-dsl) is not installed")

from ptx import numbers
from ptx.device import gpu, in_turn
from ptx.judging import check
from ptx.machine import PURE, Machine
from ptx.memory import Fault, GlobalMemory
from ptx.program import parse

F32, U16, U32 = np.float32, np.uint16, np.uint32
PATTERNS = np.arange(2**16, dtype=np.uint32).astype(np.uint16)
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
MANTISSA = {"bf16": (8, -133), "f16": (11, -24), "f32": (24, -149)}  # bits with the hidden one, the smallest exponent
LARGEST = {"bf16": float(torch.finfo(torch.bfloat16).max), "f16": 65504.0, "f32": float(np.finfo(F32).max)}

rng = np.random.default_rng(0)


def as_torch(patterns: Any, kind: str) -> torch.Tensor:
    return torch.from_numpy(patterns.astype(np.int32)).to(torch.int16).view(DTYPES[kind])


def floats(*bits: Any) -> Any:
    return np.concatenate([np.asarray(b, U32).ravel() for b in bits]).view(F32)


def nasty() -> Any:
    """fp32 numbers of every kind, and those at and beside the middle of two neighbours of a 16-bit type."""
    anything = rng.integers(0, 2**32, 200_000, dtype=np.uint64).astype(U32)
    bf16_halves = (PATTERNS.astype(U32) << U32(16)) | U32(0x8000)
    with np.errstate(all="ignore"):
        f16 = PATTERNS.view(np.float16).astype(F32)
        f16_halves = ((f16 + np.nextafter(PATTERNS.view(np.float16), np.float16(np.inf)).astype(F32)) / F32(2)).view(
            U32
        )
    halves = np.concatenate([bf16_halves, f16_halves])
    return floats(anything, halves, halves + U32(1), halves - U32(1), f16.view(U32))


def assert_same_bits(got: Any, expected: Any) -> None:
    """NaN is NaN: its bits are the hardware's own."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.dtype == expected.dtype
    bits = f"u{got.dtype.itemsize}"
    same = (got.view(bits) == expected.view(bits)) | (np.isnan(got) & np.isnan(expected))
    assert same.all(), (got[~same][:5], expected[~same][:5])


# --- conversions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DTYPES)
def test_every_16_bit_pattern_widens_as_in_torch(kind: str) -> None:
    widened = PURE[f"cvt.f32.{kind}"].function(PATTERNS)
    assert_same_bits(widened, as_torch(PATTERNS, kind).float().numpy())


@pytest.mark.parametrize("kind", DTYPES)
def test_fp32_narrows_as_in_torch(kind: str) -> None:
    values = nasty()
    with np.errstate(all="ignore"):
        narrow = PURE[f"cvt.rn.{kind}.f32"].function(values)
    widen = PURE[f"cvt.f32.{kind}"].function
    assert_same_bits(widen(narrow), torch.from_numpy(values).to(DTYPES[kind]).float().numpy())
    nan = narrow[np.isnan(values)]
    assert len(nan) and (nan == 0x7FFF).all()  # what the manual calls the canonical NaN


@pytest.mark.parametrize("kind", DTYPES)
def test_a_packed_conversion_puts_its_first_operand_into_the_upper_half(kind: str) -> None:
    one, two = np.array([1.0], F32), np.array([2.0], F32)
    packed = PURE[f"cvt.rn.{kind}x2.f32"].function(one, two).view(U16)
    assert PURE[f"cvt.f32.{kind}"].function(packed).tolist() == [2.0, 1.0]


def near_e4m3() -> Any:
    """All bf16 numbers, a million fp32 numbers, and those at and beside the middle of two neighbours of e4m3."""
    e4m3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    middles = ((e4m3[1:] + e4m3[:-1]) / F32(2)).view(U32)
    ties = np.concatenate([middles, middles + U32(1), middles - U32(1)])
    anything = rng.integers(0, 2**32, 500_000, dtype=np.uint64).astype(U32)
    of_its_range = rng.integers(0x3A000000, 0x43F00000, 500_000, dtype=np.uint64).astype(U32)
    return floats(PATTERNS.astype(U32) << U32(16), anything, of_its_range, ties, ties | U32(2**31))


def test_fp32_becomes_8_bits_of_e4m3_as_in_torch_and_saturates() -> None:
    values = near_e4m3()
    with np.errstate(all="ignore"):
        pairs = PURE["cvt.rn.satfinite.e4m3x2.f32"].function(values, -values)
    nan, low, high = np.isnan(values), pairs & U16(0xFF), pairs >> U16(8)
    for got, given in ((high, values), (low, -values)):
        cast = torch.from_numpy(given).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        assert (got[~nan] == cast[~nan]).all()
    assert (pairs[nan] == 0x7F7F).all() and nan.any()
    assert computed("cvt.rn.satfinite.e4m3x2.f32", [math.inf, -math.inf], [464.1, -1e9]) == [0x7E7E, 0xFEFE]


# --- arithmetic that rounds once ------------------------------------------------------------------------------------


def rounded(exact: Fraction, kind: str) -> float:
    """To nearest even, of a finite number; infinite where that is larger than the largest."""
    bits, smallest = MANTISSA[kind]
    if exact == 0:
        return 0.0
    exponent = math.frexp(float(abs(exact)) or 2.0**-1000)[1]
    while abs(exact) >= Fraction(2) ** exponent:
        exponent += 1
    while abs(exact) < Fraction(2) ** (exponent - 1) and exponent > smallest + bits:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - bits, smallest)
    value = round(exact / unit) * unit
    return math.copysign(math.inf, exact) if abs(value) > LARGEST[kind] else float(value)


def triples(kind: str, count: int = 4000) -> list[Any]:
    """Finite numbers: any, of near exponents that cancel, and those whose sum lies next to a tie."""
    if kind == "f32":
        near = lambda: rng.integers(0x3F000000, 0x41000000, count, dtype=np.uint64).astype(U32).view(F32)  # noqa: E731
        far = lambda: rng.integers(0, 2**32, count, dtype=np.uint64).astype(U32).view(F32)  # noqa: E731
        small = lambda: rng.integers(0, 0x02000000, count, dtype=np.uint64).astype(U32).view(F32)  # noqa: E731
        a = [near(), far(), near(), near(), near(), small()]
        b = [near(), far(), near(), near(), small(), near()]
        with np.errstate(all="ignore"):
            cancelling = -(a[2] * b[2]).astype(F32)
            tie = (a[3] * b[3]) * F32(2.0**-24)
        c = [-near(), far(), cancelling, tie, small(), -small()]
        columns = [np.concatenate(column) for column in (a, b, c)]
    else:
        widen = PURE[f"cvt.f32.{kind}"].function
        columns = [widen(rng.integers(0, 2**16, 6 * count).astype(U16)) for _ in range(3)]
    finite = np.isfinite(columns).all(0)
    return [column[finite] for column in columns]


def assert_rounded_once(got: Any, exacts: list[Fraction], kind: str) -> None:
    expected = np.array([rounded(exact, kind) for exact in exacts])
    got = got.astype(np.float64)
    wrong = got != expected
    assert not wrong.any(), (got[wrong][:5], expected[wrong][:5])


def test_fma_of_fp32_is_rounded_once() -> None:
    a, b, c = triples("f32")
    with np.errstate(all="ignore"):
        got = PURE["fma.rn.f32"].function(a, b, c)
    exacts = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    assert_rounded_once(got, exacts, "f32")


def test_fma_of_fp64_is_rounded_once() -> None:
    a, b = (rng.standard_normal(3000) * 2.0 ** rng.integers(-30, 30, 3000) for _ in range(2))
    c = np.where(np.arange(3000) % 2, -a * b * (1 + 2.0**-52), rng.standard_normal(3000))
    got = PURE["fma.rn.f64"].function(a, b, c)
    exacts = [Fraction(x) * Fraction(y) + Fraction(z) for x, y, z in zip(*(t.tolist() for t in (a, b, c)), strict=True)]
    assert got.tolist() == [float(exact) for exact in exacts]
    assert computed("fma.rn.f64", [math.inf, math.inf, 1.0], [1.0, 1.0, 2.0], [1.0, -math.inf, 3.0])[::2] == [
        math.inf,
        5,
    ]


def test_fma_may_be_rounded_down() -> None:
    a, b, c = triples("f32")
    with np.errstate(all="ignore"):
        down, nearest = (PURE[f"fma.{mode}.f32"].function(a, b, c).astype(np.float64) for mode in ("rm", "rn"))
    exacts = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    finite = np.isfinite(down) & np.isfinite(nearest)
    below = np.array([Fraction(d) <= e for d, e in zip(down[finite], np.array(exacts)[finite], strict=True)])
    assert below.all()
    step = np.nextafter(down[finite].astype(F32), F32(np.inf)).astype(np.float64)
    assert ((nearest[finite] == down[finite]) | (nearest[finite] == step)).all()


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("name", ("add", "mul", "fma"))
def test_16_bit_arithmetic_is_rounded_once(kind: str, name: str) -> None:
    columns = triples(kind, 1500)[: 3 if name == "fma" else 2]
    narrow, widen = PURE[f"cvt.rn.{kind}.f32"].function, PURE[f"cvt.f32.{kind}"].function
    with np.errstate(all="ignore"):
        got = widen(PURE[f"{name}.rn.{kind}"].function(*map(narrow, columns)))
    rows = [[Fraction(float(v)) for v in row] for row in zip(*columns, strict=True)]
    exacts = [sum(row) if name == "add" else row[0] * row[1] + sum(row[2:]) for row in rows]
    assert_rounded_once(got, exacts, kind)


def test_fma_of_nan_and_infinity_is_that_of_the_manual() -> None:
    inf, nan = math.inf, math.nan
    rows = [(inf, 0, 1), (inf, 1, -inf), (inf, 1, 1), (nan, 1, 1), (1, 1, inf), (-1, inf, 3e38), (3e38, 2, -inf)]
    with np.errstate(all="ignore"):
        got = PURE["fma.rn.f32"].function(*np.array(rows, F32).T)
    assert_same_bits(got, np.array([nan, nan, inf, nan, inf, -inf, -inf], F32))


def test_a_product_that_underflows_next_to_a_tie_is_no_nan() -> None:
    tiny = np.array([0x0001, 0x8001, 0x0080], U16)
    half = np.array([0x3F00, 0x3F00, 0x0080], U16)
    assert PURE["mul.bf16"].function(tiny, half).tolist() == [0, 0x8000, 0]


# --- instructions of one lane ---------------------------------------------------------------------------------------


def computed(opcode: str, *columns: Any) -> list[Any]:
    pure = PURE[opcode]
    with np.errstate(all="ignore"):
        return pure.function(*(np.array(c, d) for c, d in zip(columns, pure.sources, strict=True))).tolist()


def test_comparisons_with_nan_are_false() -> None:
    nan, one = [math.nan, math.nan, 1.0], [1.0, math.nan, math.nan]
    for name in ("eq", "ne", "lt", "le", "gt", "ge"):
        assert computed(f"setp.{name}.f32", nan, one) == [False] * 3
    for name, of_two_and_one in {"ltu": False, "leu": False, "gtu": True, "geu": True}.items():
        assert computed(f"setp.{name}.f32", [*nan, 2.0], [*one, 1.0]) == [True, True, True, of_two_and_one]


@pytest.mark.parametrize("kind", DTYPES)
def test_the_larger_of_two_is_nan_if_one_of_them_is(kind: str) -> None:
    narrow, widen = PURE[f"cvt.rn.{kind}.f32"].function, PURE[f"cvt.f32.{kind}"].function
    a, b = (np.array(values, F32) for values in ([1, math.nan, 2, -0.0, 3], [2, 1, math.nan, 0.0, -math.inf]))
    with np.errstate(all="ignore"):
        assert_same_bits(widen(PURE[f"max.NaN.{kind}x2"].function(narrow(a), narrow(b))), np.maximum(a, b))
    assert np.isnan(computed("max.NaN.f32", [1.0, math.nan], [math.nan, 1.0])).all()
    assert computed("max.NaN.f32", [1.0, -2.0], [2.0, -math.inf]) == [2, -2]


def test_comparisons_know_signed_from_unsigned() -> None:
    assert computed("setp.lt.s32", [-1], [1]) == [True]
    assert computed("setp.lt.u32", [2**32 - 1], [1]) == [False]
    assert computed("setp.eq.f32", [0.0], [-0.0]) == [True]


@pytest.mark.parametrize("kind", DTYPES)
def test_comparisons_of_16_bits_are_those_of_the_same_numbers_in_fp32(kind: str) -> None:
    values = np.array([math.nan, -math.inf, -2, -0.0, 0.0, 1, 2, math.inf], F32)
    a, b = (pair.ravel() for pair in np.meshgrid(values, values))
    narrow = PURE[f"cvt.rn.{kind}.f32"].function
    for name in ("eq", "ne", "lt", "le", "gt", "ge", "ltu", "leu", "gtu", "geu"):
        of_narrow = PURE[f"setp.{name}.{kind}"].function(narrow(a), narrow(b))
        assert (of_narrow == PURE[f"setp.{name}.f32"].function(a, b)).all()


def test_shifts_by_the_width_and_more_give_zero() -> None:
    assert computed("shl.b32", [1] * 5, [0, 31, 32, 33, 2**32 - 1]) == [1, 2**31, 0, 0, 0]
    assert computed("shr.u32", [2**31] * 5, [0, 31, 32, 33, 2**32 - 1]) == [2**31, 1, 0, 0, 0]
    assert computed("shl.b64", [1] * 3, [32, 63, 64]) == [2**32, 2**63, 0]
    assert computed("shr.u16", [2**15] * 3, [15, 16, 32]) == [1, 0, 0]


def test_integers_divide_towards_zero() -> None:
    assert computed("div.s32", [7, -7, 7, -7, -(2**31)], [2, 2, -2, -2, 1]) == [3, -3, -3, 3, -(2**31)]
    with pytest.raises(Fault, match="divided by zero"):
        computed("div.s32", [1], [0])


def test_wide_products_keep_their_upper_half_and_sign() -> None:
    assert computed("mul.wide.s32", [-3, -(2**31)], [2**30, -(2**31)]) == [-3 * 2**30, 2**62]
    assert computed("mul.wide.u32", [2**32 - 1], [2**32 - 1]) == [(2**32 - 1) ** 2]
    assert computed("mul.wide.u16", [2**16 - 1], [2**16 - 5]) == [(2**16 - 1) * (2**16 - 5)]
    assert computed("mul.lo.s32", [2**30], [4]) == [0]
    assert computed("cvt.s64.s32", [-5]) == [-5] and computed("cvt.u64.u32", [2**32 - 5]) == [2**32 - 5]


def test_upper_halves_of_products_are_exact() -> None:
    a, b = 0xFEDCBA9876543210, 0xFFFFFFFFFFFFFFFB
    assert computed("mul.hi.u64", [a, 2**63], [b, 2]) == [a * b >> 64, 1]
    assert computed("mul.hi.u32", [2**32 - 1], [2**32 - 5]) == [(2**32 - 1) * (2**32 - 5) >> 32]
    assert computed("mul.hi.u16", [2**16 - 1], [2**16 - 5]) == [(2**16 - 1) * (2**16 - 5) >> 16]
    assert computed("cvt.u16.u32", [2**16 + 5]) == [5] and computed("cvt.u64.u16", [2**16 - 5]) == [2**16 - 5]
    assert computed("cvt.u32.u16", [2**16 - 5]) == [2**16 - 5]


def test_a_saturating_conversion_ends_at_0_and_1_and_makes_a_nan_0() -> None:
    assert computed("cvt.sat.f32.f32", [-2.0, 0.25, 7.0, math.nan]) == [0, 0.25, 1, 0]


def test_fp64_narrows_to_fp32_once() -> None:
    assert computed("cvt.rn.f32.f64", [1 + 2.0**-24, 1 + 3 * 2.0**-24, 1e300]) == [1, 1 + 2.0**-22, math.inf]
    assert computed("cvt.f64.f32", [0.1]) == [float(F32(0.1))]


def test_selp_takes_its_first_operand_where_the_predicate_holds() -> None:
    assert computed("selp.b32", [1, 1], [2, 2], [True, False]) == [1, 2]


def test_copysign_takes_the_sign_of_its_first_operand() -> None:
    assert computed("copysign.f32", [-0.0, 1.0], [3.0, -3.0]) == [-3.0, 3.0]


# --- instructions of a warp -----------------------------------------------------------------------------------------


def stored_by_each_lane(body: str) -> list[int]:
    """Runs a kernel of one warp and two CTAs, each lane of which stores %r9."""
    text = f"""
.visible .entry kernel(
\t.param .u64 out
)
.reqntid 32, 1, 1
{{
\t.reg .pred %p<4>;
\t.reg .b32 %r<16>;
\t.reg .b64 %rd<8>;
\tld.param.b64 %rd1, [out];
\tmov.u32 %r1, %tid.x;
\tmov.u32 %r2, %ctaid.x;
\tmad.lo.s32 %r3, %r2, 32, %r1;
\tmul.wide.u32 %rd2, %r3, 4;
\tadd.s64 %rd3, %rd1, %rd2;
{body}
\tst.global.b32 [%rd3], %r9;
\tret;
}}
"""
    memory = GlobalMemory()
    address = memory.add("out", {0: ((), 256)}, 4, 0, writable=True)
    memory.freeze()
    Machine(parse(text), (2, 1, 1), 0, memory, {"out": struct.pack("<Q", address)}).run()
    return np.frombuffer(memory.content("out"), U32).tolist()


def test_butterflies_exchange_within_the_warp() -> None:
    got = stored_by_each_lane("shfl.sync.bfly.b32 %r9, %r3, 4, 31, -1;")
    assert got == [lane ^ 4 for lane in range(64)]


def test_an_indexed_shuffle_gives_every_lane_that_of_its_own_warp() -> None:
    assert stored_by_each_lane("shfl.sync.idx.b32 %r9, %r3, 5, 31, -1;") == [5] * 32 + [37] * 32


def test_a_reduction_gives_every_lane_the_largest_number_of_its_own_warp() -> None:
    body = "xor.b32 %r4, %r3, 21;\nredux.sync.max.s32 %r9, %r4, -1;"
    assert stored_by_each_lane(body) == [31] * 32 + [63] * 32
    with pytest.raises(Fault, match="waits for all of its warp"):
        stored_by_each_lane("setp.lt.u32 %p1, %r1, 8;\nmov.b32 %r9, 1;\n@%p1 redux.sync.max.s32 %r9, %r9, -1;")


def test_a_barrier_of_a_warp_takes_all_of_it() -> None:
    assert stored_by_each_lane("mov.b32 %r9, %r3;\nbar.warp.sync -1;") == list(range(64))
    with pytest.raises(Fault, match="waits for all of its warp"):
        stored_by_each_lane("setp.lt.u32 %p1, %r1, 8;\nmov.b32 %r9, 1;\n@%p1 bar.warp.sync -1;")


def test_lanes_that_branch_apart_join_again() -> None:
    body = """
    mov.b32 %r9, 1;
    setp.lt.u32 %p1, %r1, 8;
    @%p1 bra $LESS;
    mov.b32 %r9, 2;
$LESS:
    shfl.sync.bfly.b32 %r9, %r9, 16, 31, -1;
"""
    assert stored_by_each_lane(body) == ([2] * 16 + [1] * 8 + [2] * 8) * 2


def test_roots_and_quotients_are_rounded_once() -> None:
    values = [2.0, 3.0, 1e-40, 1e30, 0.0, math.inf]
    exact = np.array(values, F32).astype(np.float64)
    with np.errstate(divide="ignore"):
        assert computed("sqrt.rn.f32", values) == list(np.sqrt(exact).astype(F32))
        assert computed("rcp.rn.f32", values) == list((1 / exact).astype(F32))
        assert computed("div.rn.f32", [7.0] * 6, values) == list((7 / exact).astype(F32))
    assert math.isnan(computed("sqrt.rn.f32", [-1.0])[0])


# --- approximate instructions ---------------------------------------------------------------------------------------


def test_approximate_instructions_give_the_nearest_numbers_and_know_the_special_ones() -> None:
    inf = math.inf
    assert computed("ex2.approx.ftz.f32", [0, 3, -inf, inf, 1e-40, -127]) == [1, 8, 0, inf, 1, 0]
    assert computed("rcp.approx.ftz.f32", [4, inf, -inf, 0, 1e-40, -1e-40]) == [0.25, 0, 0, inf, inf, -inf]
    assert computed("rcp.approx.ftz.f32", [2.0**127]) == [0]
    assert computed("rsqrt.approx.f32", [4, 0, -0.0, inf, 2.0**-148]) == [0.5, inf, -inf, 0, 2.0**74]
    assert math.isnan(computed("rsqrt.approx.f32", [-1.0])[0])
    assert math.isnan(computed("ex2.approx.ftz.f32", [math.nan])[0])


@pytest.mark.parametrize("direction", (-1, 1))
def test_a_perturbed_result_is_off_by_what_the_manual_allows_and_special_ones_stay(direction: int) -> None:
    values = np.linspace(0.1, 20, 1001, dtype=F32)
    exact = {"ex2.approx.ftz.f32": np.exp2, "rcp.approx.ftz.f32": np.reciprocal, "rsqrt.approx.f32": lambda a: a**-0.5}
    for opcode, function in exact.items():
        with numbers.perturbed(direction):
            got = PURE[opcode].function(values).astype(np.float64)
        off = (got / function(values.astype(np.float64)) - 1) * direction
        assert (off > 0).all() and off.max() <= 2.0**-21
    with numbers.perturbed(direction):
        assert computed("rsqrt.approx.f32", [0.0, math.inf]) == [math.inf, 0]
        assert computed("ex2.approx.ftz.f32", [-math.inf, math.inf]) == [0, math.inf]


@pytest.mark.parametrize("direction", (-1, 1))
@pytest.mark.parametrize(("arch", "op"), in_turn(bounds.OPS))
def test_kernels_stay_within_the_bounds_whichever_way_approximations_err(arch: str, op: str, direction: int) -> None:
    with gpu(arch, 1), numbers.perturbed(direction):
        check(op, bounds.operands(2, 3, 3840))
        check(op, bounds.operands(2, 3, 2520, torch.float32))
        check(op, bounds.operands(2, 3, 2304, torch.float16))
