"""Faults put into the PTX of a kernel: each is found, with a message that says who did what where."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import kernel_bounds as bounds
import pytest
import torch

pytest.importorskip("cutlass", reason="CuTeDSL (nvidia-cutlass-dsl) is not installed")

from ptx.device import compiled, gpu
from ptx.judging import check
from ptx.memory import Fault
from ptx.program import Unsupported

WHERE = r"thread \d+ of CTA \(\d+, \d+, \d+\).* line \d+, `"
VALUE = r"[yz]\[0, \d+, \d+\] is \S+, by the definition \S+: off by \S+ steps"
Edit = Callable[[str], str]


def run(edit: Edit, arch: str = "sm_90a", op: str = bounds.DUAL, small: bool = False, **operands: Any) -> None:
    """CTAs of this launch walk rows enough to fill each stage again."""
    o = bounds.operands(**{"batch": 1, "tokens": 14, "d": 3840, **operands})
    if small:
        o = replace(o, x=o.x * 1e-3)
    with gpu(arch, 1, lambda *key: compiled(*key).edited(edit)):
        check(op, o)


def without(pattern: str, which: int) -> Edit:
    """The edit that leaves one of the matches of `pattern` out."""

    def edit(ptx: str) -> str:
        match = list(re.finditer(pattern, ptx))[which]
        return ptx[: match.start()] + ptx[match.end() :]

    return edit


def swapped(pattern: str, replacement: str, count: int = 0) -> Edit:
    return lambda ptx: re.sub(pattern, replacement, ptx, count=count)


def lane_zero(ptx: str) -> str:
    lane = re.search(r"mov\.u32\s+(%r\d+), %laneid", ptx)
    assert lane
    predicate = re.search(rf"setp\.ne\.b32\s+(%p\d+), {lane[1]}, 0", ptx)
    assert predicate
    return predicate[1]


def test_an_edit_that_changes_no_meaning_is_no_fault() -> None:
    run(lambda ptx: ptx + "\n")


@pytest.mark.parametrize("arch", ("sm_80", "sm_90a"))
@pytest.mark.parametrize("which", (-1, -2))
def test_a_missing_barrier_of_a_sum_is_found(arch: str, which: int) -> None:
    which -= arch != "sm_80"  # there the last barrier is that of the stage
    with pytest.raises(Fault, match=WHERE + ".*of shared memory, which"):
        run(without(r"bar\.sync\s+0;", which), arch)


def test_a_missing_barrier_before_a_stage_is_filled_again_is_found() -> None:
    # Not of the dual: it reads nothing of a stage after the barrier of its second sum.
    with pytest.raises(Fault, match=WHERE + "(cp.async.bulk.*no barrier between|ld.shared.*where the copy of line)"):
        run(without(r"bar\.sync\s+0;", -1), op="norm_tanh_mul_add", dtype=torch.float32)


def test_a_row_looked_up_before_a_barrier_is_found() -> None:
    with pytest.raises(Fault, match=WHERE + "ld.shared.b32.*wrote: no barrier between"):
        run(without(r"bar\.sync\s+0;", 0))


def test_mbarriers_used_before_a_barrier_are_found() -> None:
    def edit(ptx: str) -> str:
        """No barrier, and all threads begin with the row that is the first of the first CTA."""
        ptx = re.sub(r"ld\.shared\.b32(\s+%r\d+), \[%r\d+\+\d+\];", r"mov.b32\1, 0;", ptx, count=1)
        return without(r"bar\.sync\s+0;", 0)(ptx)

    with pytest.raises(Fault, match=WHERE + "mbarrier.try_wait.*initialised: no barrier between"):
        run(edit)


def test_a_reduction_buffer_used_for_two_sums_is_found() -> None:
    def edit(ptx: str) -> str:
        _, first, second, *_ = re.findall(r"ld\.shared\.b32\s+%r\d+, \[%r\d+\+(\d+)\]", ptx)  # before them, the row
        return ptx.replace(f"+{second}]", f"+{first}]")

    with pytest.raises(Fault, match=WHERE + "st.shared.*no barrier between"):
        run(edit)


@pytest.mark.parametrize("arch", ("sm_80", "sm_90a"))
def test_a_lane_that_reads_one_partial_sum_too_many_is_found(arch: str) -> None:
    with pytest.raises(Fault, match=WHERE + "ld.shared.*(nothing wrote|out of bounds|no barrier)"):
        run(swapped(r"(setp\.eq\.b32\s+%p\d+, %r\d+), 15;", r"\1, 16;"), arch)


def test_a_tail_predicate_off_by_one_is_found() -> None:
    with pytest.raises(Fault, match=WHERE + ".*out of bounds|which nothing wrote|a second time"):
        run(swapped(r"(setp\.lt\.u32\s+%p\d+, %r\d+), 473;", r"\1, 474;"), d=2521)


def test_a_row_that_is_not_written_is_found() -> None:
    with pytest.raises(Fault, match=r"never written, the first at [yz]\[0, \d+, \d+\]"):
        run(without(r"st\.global\.v4\.b32[^;]*;", -1))


def test_an_output_written_twice_is_found() -> None:
    with pytest.raises(Fault, match=WHERE + r".*writes y\[0, \d+, \d+\] a second time, after thread"):
        run(swapped(r"(st\.global\.v4\.b32[^;]*;)", r"\1 \1", 1))


def test_a_wait_that_is_left_out_is_found() -> None:
    with pytest.raises(Fault, match=WHERE + "ld.shared.*copy of line \\d+ lands: nothing waited"):
        run(swapped(r"mbarrier\.try_wait\S+ P1, \[%r\d+\], (%r\d+), \d+;", r"setp.eq.u32 P1, \1, \1;"))


def test_a_wait_for_the_phase_before_is_found() -> None:
    def edit(ptx: str) -> str:
        wait = re.search(r"mbarrier\.try_wait\S+ P1, \[%r\d+\], (%r\d+)", ptx)
        assert wait
        return re.sub(rf"mov\.b32\s+{wait[1]}, 0;", f"mov.b32 {wait[1]}, 1;", ptx)

    with pytest.raises(Fault, match=WHERE + "(ld.shared.*nothing waited|mbarrier.try_wait.*waits for ever)"):
        run(edit)


def test_a_copy_of_fewer_bytes_than_expected_is_a_wait_for_ever() -> None:
    with pytest.raises(Fault, match=WHERE + "mbarrier.try_wait.*waits for ever.*16 bytes missing"):
        run(swapped(r"(mov\.b32\s+%r\d+), 15360;", r"\1, 15376;"))


def test_a_shuffle_under_a_branch_of_one_lane_is_found() -> None:
    with pytest.raises(Fault, match=WHERE + "@.*shfl.sync.*waits for all of its warp"):
        run(lambda ptx: ptx.replace("shfl.sync.bfly", f"@!{lane_zero(ptx)} shfl.sync.bfly", 1))


def test_a_barrier_under_a_branch_of_one_lane_is_found() -> None:
    with pytest.raises(Fault, match=WHERE + "shfl.sync.*waits for all of its warp, of which 31"):
        run(lambda ptx: re.sub(r"(bar\.sync\s+0;)(?![\s\S]*bar\.sync)", rf"@{lane_zero(ptx)} \1", ptx))


@pytest.mark.parametrize("arch", ("sm_80", "sm_90a"))
def test_a_missing_one_plus_is_found(arch: str) -> None:
    def edit(ptx: str) -> str:
        """Of the sums with 1, those of tanh end in a division."""
        divided = set(re.findall(r"rcp\.approx\.ftz\.f32\s+%r\d+, (%r\d+)", ptx))
        one = r"add\.f32\s+(%r\d+), (%r\d+), 0f3F800000;"
        return re.sub(one, lambda m: m[0] if m[1] in divided else f"mov.b32 {m[1]}, {m[2]};", ptx)

    with pytest.raises(AssertionError, match=VALUE):
        run(edit, arch)


def test_a_counter_that_is_not_at_zero_again_is_found() -> None:
    with pytest.raises(Fault, match="left counters at"):
        run(swapped(r"(atom\.global\.inc\.u32\s+%r\d+, \[%rd\d+\]), %r\d+;", r"\1, 1000000;"))


def test_a_ticket_of_another_counter_is_found() -> None:
    with pytest.raises(Fault, match=WHERE + "atom.*where no counter is"):
        run(swapped(r"(atom\.global\.inc\.u32\s+%r\d+, \[%rd\d+)\]", r"\1+64]"))


def test_a_wrong_eps_is_found() -> None:
    with pytest.raises(AssertionError, match=VALUE):
        run(swapped(r"(ld\.param\.b32\s+%r\d+, \[\w+_param_)4\]", r"\g<1>7]"), small=True)


def test_tanh_of_the_wrong_operand_is_found() -> None:
    other = {"2": "6", "6": "2"}
    with pytest.raises(AssertionError, match=VALUE):
        run(lambda ptx: re.sub(r"(_param_)([26])(?=[+\]])", lambda m: m[1] + other[m[2]], ptx))


def test_a_fence_that_is_left_out_is_found() -> None:
    with pytest.raises(Fault, match=WHERE + "cp.async.bulk.*no fence.mbarrier_init"):
        run(without(r"fence\.mbarrier_init[^;]*;", 0))


def test_stores_of_half_a_vector_are_found() -> None:
    with pytest.raises(Fault, match=WHERE + ".*a second time|never written"):
        run(
            swapped(r"st\.global\.v4\.b32\s+(\[[^]]+\]), \{(%r\d+), (%r\d+), [^}]*\}", r"st.global.v2.b32 \1, {\2, \3}")
        )


def test_an_input_that_is_written_is_found() -> None:
    with pytest.raises(Fault, match=WHERE + r"st.global.*writes (x|residual|gate)\[.*, an input"):
        run(
            lambda ptx: re.sub(
                r"(ld\.global\.v4\.b32)\s+\{([^}]*)\}, (\[[^]]+\]);", r"\g<0> st.global.v4.b32 \3, {\2};", ptx
            )
        )


def test_an_unknown_instruction_is_named_and_never_skipped() -> None:
    with pytest.raises(Unsupported, match=r"line \d+.*does not know rsqrt.approx.ftz.f32"):
        run(lambda ptx: ptx.replace("rsqrt.approx.f32", "rsqrt.approx.ftz.f32"))
