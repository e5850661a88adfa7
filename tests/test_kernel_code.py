"""What the kernels compile to, for every architecture, read from PTX and cubin: this needs no GPU."""

from __future__ import annotations

import re
import struct
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("cutlass", reason="CuTeDSL (nvidia-cutlass-dsl) is not installed")

from kernel_variants import variant, with_specs
from ptx.device import ARCHS, UNLIKE, compiled, on_two

from dit_kernels.chain import GATED, SCALED, SECOND, ActivationChain, NormChain, Stage
from dit_kernels.compile import Variant
from dit_kernels.cute.spec import TensorSpec, Walk
from dit_kernels.cute.tiling import JOINED_REGISTERS, machine, plain_row_tiling, row_tiling
from dit_kernels.families import OPS
from dit_kernels.families.modulated_norm import FAMILY
from dit_kernels.rounding import FORMS, FP8, QuantSteps, StaticSteps, activation_steps, stage_steps

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
COMPILED = (*ARCHS, "sm_89")  # sm_89 runs what sm_80 does, from the same PTX


def dual(
    d: int,
    dtype: torch.dtype = BF16,
    *,
    form: str = "cast_then_weight",
    norm: str = "rms",
    root: str = "rsqrt",
    bias: bool = False,
    walk: Walk = "batch",
) -> Variant:
    """The dual with every operand of one dtype, all as aligned as contiguous rows are; walk: of gate and scale."""
    b = dtype if bias else None
    first = stage_steps(form, norm, dtype, dtype, b, dtype, dtype, root=root)
    second = stage_steps(form, norm, first.out, dtype, b, dtype, None, root=root)
    access = min(16, (d & -d) * dtype.itemsize)
    row, column = TensorSpec(dtype, "token", access), TensorSpec(dtype, "column", 16)
    modulation = TensorSpec(dtype, walk, access)
    chain = NormChain((Stage(norm, "tanh", first, GATED), Stage(norm, "one_plus", second, SECOND)))
    columns = dict(weight=column, bias=column if bias else None, weight2=column, bias2=column if bias else None)
    return variant(FAMILY, chain, d, x=row, gate=modulation, residual=row, scale=modulation, y=row, z=row, **columns)


def gated(dual: Variant) -> Variant:
    """The first line of the dual alone."""
    one = replace(dual, chain=NormChain(dual.chain.stages[:1]))
    return with_specs(one, weight2=None, bias2=None, scale=None, z=None)


def scaled(dual: Variant) -> Variant:
    """The second line of the dual alone."""
    one = replace(dual, chain=NormChain((replace(dual.chain.stages[1], names=SCALED),)))
    return with_specs(one, weight2=None, bias2=None, gate=None, residual=None, y=None)


VARIANTS = {
    "bf16": dual(3840),
    "bf16-gated": gated(dual(3840)),
    "bf16-scaled": scaled(dual(3840)),
    "bf16-layer-gated": gated(dual(3840, norm="layer", bias=True)),
    "bf16-narrow": dual(2304),
    "bf16-tail": gated(dual(2520)),
    "bf16-8192": gated(dual(8192)),
    "fp16": dual(3840, FP16),
    "bf16-fp32": dual(3840, form="fp32"),
    "bf16-fp32-gated": gated(dual(3840, form="fp32")),
    "fp32-gated": gated(dual(3840, FP32)),
    "bf16-per-token": dual(3840, walk="token"),
    "bf16-per-token-gated": gated(dual(3840, walk="token")),
    "bf16-per-token-scaled": scaled(dual(3840, walk="token")),
    "bf16-per-token-8192": dual(8192, walk="token"),
    "bf16-layer-bias": dual(3840, norm="layer", bias=True),
    "fp16-native": dual(3072, FP16, form="native"),
    "fp32": dual(3840, FP32),
    "bf16-widest-resident": dual(16384, norm="layer", bias=True),
    "bf16-in-passes": dual(32768),
    "bf16-odd": dual(2521),
    "bf16-quotient": dual(3840, root="quotient"),
}


def code(arch: str, variant: Variant) -> tuple[str, bytes]:
    """(PTX, cubin)"""
    kernel = compiled(arch, variant)
    return kernel.ptx, kernel.cubin


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread, and the bytes of its stack frame, where spills go, from an ELF's .nv.info section."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    count, names = struct.unpack_from("<HH", cubin, 0x3C)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * 64) for i in range(count)]
    strings = sections[names][4]
    found: dict[str, int] = {}
    for name, _, _, _, offset, size in sections:
        start = strings + name
        if cubin[start : cubin.index(b"\0", start)] == b".nv.info":
            found |= attributes(cubin[offset : offset + size])
    return found


def attributes(info: bytes) -> dict[str, int]:
    wanted = {0x11: "frame", 0x2F: "registers"}
    found, at = {}, 0
    while at < len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == 4:  # the value follows: (symbol, number); in the other formats `size` is the value
            if attribute in wanted:
                found[wanted[attribute]] = struct.unpack_from("<I", info, at + 4)[0]
            at += size
    return found


@pytest.mark.parametrize(("arch", "name"), on_two(VARIANTS, COMPILED))
def test_nothing_spills_and_as_many_ctas_fit_as_are_launched(arch: str, name: str) -> None:
    assert_fits(arch, VARIANTS[name])


def assert_fits(arch: str, variant: Variant) -> None:
    ptx, cubin = code(arch, variant)
    used, tiling = resources(cubin), variant.tiling(arch)
    assert ".local" not in ptx
    assert used["frame"] == 0
    ctas = 1 if tiling.schedule is None else tiling.schedule.ctas
    assert -(-used["registers"] // 8) * 8 * tiling.threads * ctas <= 65536


def quantised(dual: Variant, **steps: Any) -> Variant:
    """The same with q and s instead of z."""
    quant = QuantSteps(**{"scale": BF16, "fmax": 448.0, "reciprocal": False, "clamp": True, **NO_SMALLEST, **steps})
    z = dual.named["z"]
    assert z is not None
    q, s = replace(z, dtype=FP8), TensorSpec(FP32, "token", 4)
    return with_specs(replace(dual, chain=replace(dual.chain, quant=quant)), z=None, q=q, s=s)


def static_with_z(of: Variant) -> Variant:
    """The same with a static scale, and with the result itself in bf16."""
    chain = replace(of.chain, quant=StaticSteps("quotient", FP32, FP32, True), keeps=True)
    kept = "out" if "out" in of.named else "z"
    results = {kept: TensorSpec(BF16, "token", 16), "static_scale": TensorSpec(FP32, "element", 4), "s": None}
    return with_specs(replace(of, chain=chain), **results)


NO_SMALLEST = {"smallest_amax": None, "smallest_scale": None}
SILU_ROW = TensorSpec(BF16, "token", 16)
ROW_WISE = QuantSteps(BF16, 448.0, None, None, False, True)
SILU_CHAIN = ActivationChain("silu", activation_steps("model", BF16, BF16), ROW_WISE)
GELU_CHAIN = ActivationChain("gelu_tanh", activation_steps("model", BF16), ROW_WISE)
SILU_RESULTS = {"q": replace(SILU_ROW, dtype=FP8), "s": TensorSpec(FP32, "token", 4)}


def joined(before: int, chain: ActivationChain, d: int, **rows: TensorSpec) -> Variant:
    """Rows that start with `before` elements of another tensor."""
    widths = {"before": replace(SILU_ROW, width=before), "q": replace(SILU_RESULTS["q"], width=before + d)}
    return variant(OPS["gelu_quant"].family, chain, d, **{**SILU_RESULTS, **widths, **rows})


QUANTISED = {
    "dual": quantised(dual(3840)),
    "dual-8192": quantised(dual(8192)),
    "dual-per-token": quantised(dual(3840, walk="token")),
    "dual-fp32": quantised(dual(3840, FP32), scale=FP32),
    "scaled": quantised(scaled(dual(3840))),
    "scaled-3072": quantised(scaled(dual(3072))),
    "scaled-tail": quantised(scaled(dual(2544))),
    "silu": variant(OPS["silu_mul_quant"].family, SILU_CHAIN, 10240, a=SILU_ROW, b=SILU_ROW, **SILU_RESULTS),
    "silu-13824": variant(OPS["silu_mul_quant"].family, SILU_CHAIN, 13824, a=SILU_ROW, b=SILU_ROW, **SILU_RESULTS),
    "quant": variant(OPS["quant"].family, replace(GELU_CHAIN, act="identity"), 3840, a=SILU_ROW, **SILU_RESULTS),
    "gelu": variant(OPS["gelu_quant"].family, GELU_CHAIN, 12288, a=SILU_ROW, **SILU_RESULTS),
    "gelu-joined": joined(3072, GELU_CHAIN, 12288, a=SILU_ROW),  # FLUX.1
    "silu-joined": joined(6144, SILU_CHAIN, 18432, a=SILU_ROW, b=SILU_ROW),  # FLUX.2
}

QUANTISED |= {f"{name}-static-with-z": static_with_z(QUANTISED[name]) for name in ("dual", "silu")}


@pytest.mark.parametrize(("arch", "name"), on_two(QUANTISED, ("sm_89", *ARCHS[1:])))
def test_what_quantises_does_not_spill_and_as_many_ctas_fit_as_are_launched(arch: str, name: str) -> None:
    assert_fits(arch, QUANTISED[name])


@pytest.mark.parametrize(("name", "rows_written"), (("dual", 1), ("scaled", 0), ("silu", 0), ("gelu", 0)))
def test_q_is_written_in_pieces_of_8_bytes_and_s_once_a_row(name: str, rows_written: int) -> None:
    ptx, _ = code("sm_90a", QUANTISED[name])
    vectors = QUANTISED[name].tiling("sm_90a").vectors
    writes = re.findall(r"st\.global\S*", ptx)
    assert sum(write.endswith(WIDE) for write in writes) == rows_written * vectors
    assert sum(write.endswith(".v4.b16") for write in writes) == vectors
    assert len(writes) == (rows_written + 1) * vectors + 1
    assert ptx.count("redux.sync.max") == 2


def test_a_joined_row_is_read_and_written_once() -> None:
    ptx, tiling = code("sm_90a", QUANTISED["gelu-joined"])[0], QUANTISED["gelu-joined"].tiling("sm_90a")
    vectors = tiling.vectors + tiling.over(3072).vectors
    assert (tiling.threads * vectors, tiling.tail, tiling.over(3072).tail) == (15360 // tiling.vector, False, False)
    assert sum(write.endswith(".v4.b16") for write in re.findall(r"st\.global\S*", ptx)) == vectors
    assert sum(read.endswith(WIDE) for read in re.findall(r"ld\.global\S*", ptx)) == vectors
    of_gelu = tiling.vectors * tiling.vector
    assert len(re.findall(r"ex2\.approx\.ftz\.f32", ptx)) == len(re.findall(r"rcp\.approx\.ftz\.f32", ptx)) == of_gelu


@pytest.mark.parametrize("parts", ((12288, 3072), (18432, 6144), (9216, 3072), (16, 24560), (20480, 4096), (176, 32)))
@pytest.mark.parametrize("width", (2, 4))
def test_a_tiling_covers_both_parts_of_a_row_once(parts: tuple[int, int], width: int) -> None:
    d, more = (max(part * 2 // width // 16, 1) * 16 for part in parts)
    tiling, vectors = plain_row_tiling(d, [width], more), 0
    for part in (d, more):
        over = tiling.over(part)
        covered = over.threads * over.vectors * over.vector
        assert part % over.vector == 0 and 0 <= covered - part < over.threads * over.vector
        assert over.tail == (covered > part)
        vectors += over.vectors
    assert vectors * tiling.vector * width <= 4 * JOINED_REGISTERS
    assert tiling.threads % 32 == 0 and tiling.threads <= 768


WIDE = (".v4.b32", ".v4.u32", ".v4.f32", ".v2.b64")


@pytest.mark.parametrize(
    ("name", "arch", "loads"),
    [
        ("bf16", "sm_80", 8),  # x, residual, gate, scale and two weights; x and residual of the next row
        *(("bf16", arch, 4) for arch in ARCHS[1:]),  # x and residual come by bulk copies
        *(("bf16-per-token", arch, 6) for arch in UNLIKE),
    ],
)
def test_aligned_rows_are_read_and_written_in_pieces_of_16_bytes_only(name: str, arch: str, loads: int) -> None:
    ptx, _ = code(arch, VARIANTS[name])
    vectors = VARIANTS[name].tiling(arch).vectors
    reads = re.findall(r"ld\.global\S*", ptx)
    writes = re.findall(r"st\.global\S*", ptx)
    assert len(reads) == loads * vectors
    assert len(writes) == 2 * vectors  # y and z
    assert all(access.endswith(WIDE) for access in reads + writes)


@pytest.mark.parametrize("arch", ARCHS[1:])
def test_bulk_copies_keep_the_memory_busy_from_a_room_that_all_ctas_fit(arch: str) -> None:
    ptx, cubin = code(arch, VARIANTS["bf16"])
    tiling = VARIANTS["bf16"].tiling(arch)
    assert tiling.schedule is not None
    rows = 2 * (tiling.schedule.stages + 1)  # x and residual, of the first rows and in the loop
    assert len(re.findall(r"cp\.async\.bulk\.shared", ptx)) == rows
    vectors = [access for access in re.findall(r"ld\.shared\S*", ptx) if access.endswith(WIDE)]
    assert len(vectors) >= 2 * tiling.vectors
    registers = -(-resources(cubin)["registers"] // 8) * 8
    assert registers * tiling.threads * tiling.schedule.ctas <= 65536
    assert (tiling.schedule.stages * 2 * 3840 * 2 + 1024) * tiling.schedule.ctas <= machine(arch).shared_bytes


@pytest.mark.parametrize(
    ("name", "later"),
    [("bf16", 0), ("bf16-per-token", 2), ("bf16-per-token-gated", 0), ("bf16-per-token-scaled", 0)],
)
def test_every_load_but_those_of_a_second_norm_is_issued_before_the_first_barrier(name: str, later: int) -> None:
    ptx, _ = code("sm_90a", VARIANTS[name])
    before, *after = ptx.split("bar.sync")
    assert "ld.global" in before
    assert sum(part.count("ld.global") for part in after) == later * VARIANTS[name].tiling("sm_90a").vectors


def test_a_sum_over_the_row_costs_one_barrier() -> None:
    for arch, others in (("sm_80", 0), ("sm_90a", 2)):  # the start, and the end of a row's stay in shared memory
        assert code(arch, VARIANTS["bf16"])[0].count("bar.sync") == 2 + others
        assert code(arch, VARIANTS["bf16-layer-bias"])[0].count("bar.sync") == 4 + others


def test_a_misaligned_operand_narrows_its_own_accesses_only() -> None:
    aligned = VARIANTS["bf16"]
    gate = aligned.named["gate"]
    assert gate is not None
    ptx, _ = code("sm_80", with_specs(aligned, gate=replace(gate, access=2)))
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) == 7
    assert len(re.findall(r"ld\.global\S*\.[bu]16", ptx)) == 8


@pytest.mark.parametrize(("arch", "name"), on_two(("bf16", "fp16-native", "fp32")))
def test_tanh_and_rsqrt_are_those_of_eager(arch: str, name: str) -> None:
    ptx, _ = code(arch, VARIANTS[name])
    assert "tanh.approx" not in ptx
    assert "rsqrt.approx.f32" in ptx  # what CUDA's rsqrtf is
    assert "rsqrt.approx.ftz" not in ptx
    assert not re.search(r"\b(add|sub|mul|fma|cvt)\S*\.ftz", ptx)


@pytest.mark.parametrize("arch", UNLIKE)
def test_a_root_that_eager_rounds_is_rounded_and_costs_one_instruction_a_row_or_one_an_element(arch: str) -> None:
    elements = VARIANTS["bf16-quotient"].tiling(arch).vectors * VARIANTS["bf16-quotient"].tiling(arch).vector
    for root, divisions in (("reciprocal", ("rcp.rn.f32", 2)), ("quotient", ("div.rn.f32", 2 * elements))):
        ptx, _ = code(arch, dual(3840, root=root))
        assert ptx.count("sqrt.rn.f32") == 2
        assert ptx.count(divisions[0]) == divisions[1]
        assert "rsqrt" not in ptx


@pytest.mark.parametrize("form", FORMS)
def test_no_rounding_form_approximates_tanh(form: str) -> None:
    assert "tanh.approx" not in code("sm_90a", dual(3840, form=form))[0]


def test_no_product_contracts_with_the_sum_that_eager_does_after_it() -> None:
    fp32, _ = code("sm_90a", VARIANTS["fp32"])
    vectors = VARIANTS["fp32"].tiling("sm_90a").vectors * VARIANTS["fp32"].tiling("sm_90a").vector
    # residual + p of each element, and mean + eps of both norms
    assert len(re.findall(r"add\.rn\.f32", fp32)) == vectors + 2
    # In 16 bits LLVM leaves the contraction to ptxas, which is told not to.
    for arch in ARCHS:
        bf16, _ = code(arch, VARIANTS["bf16"])
        contracted = re.findall(r"fma\.rn\.bf16x2\s+%\w+, (%\w+), (%\w+), (%\w+)", bf16)
        constants = set(re.findall(r"mov\.b32\s+(%\w+), -?\d+;", bf16))
        assert all({factor, addend} & constants for _, factor, addend in contracted)  # a * b - 0, or a * 1 + b


@pytest.mark.parametrize("d", [1, 7, 333, 2304, 2520, 2521, 3072, 3840, 4608, 8192, 12288, 16384, 32768, 65536])
@pytest.mark.parametrize("widths", [(2, 2), (4, 4), (2, 4)])
@pytest.mark.parametrize("arch", ARCHS)
def test_a_tiling_covers_every_element_of_a_row_once(d: int, widths: tuple[int, int], arch: str) -> None:
    tiling = row_tiling((2, 1), d, widths, (2, 2), arch)
    assert d % tiling.vector == 0
    covered = tiling.threads * tiling.vectors * tiling.vector
    assert covered >= d
    assert tiling.tail == (covered > d)
    assert tiling.threads % 32 == 0
    assert tiling.threads <= (512 if tiling.vectors > 1 else 640)
    assert covered - d < tiling.threads * tiling.vector  # no thread's last vector is outside for all threads
