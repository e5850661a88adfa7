"""torch.ops.dit_kernels.*: registration, fake implementations, dispatch.

    norm_tanh_mul_add             y = residual + tanh(gate) * norm(x)
    norm_tanh_mul_add_norm_scale  the same y, and z = norm(y) * (1 + scale) + shift
    mul_add_norm_scale            y = residual + gate * x, and the same z
    norm_scale                    z = norm(x) * (1 + scale) + shift
    norm_rope                     rotate(norm(x)) of heads
    qk_norm_rope                  rotate(norm(q)) and rotate(norm(k)), with one rotation
    qk_norm_part_rope             norm(q) and norm(k), of which the last tokens are rotated
    qk_norm_cat_rope              rotate(cat(norm(q_before), norm(q))), and the same for k
    norm_all_heads_rope           rotate(norm(x)), with one norm over all heads of a token
    silu_mul                      silu(a) * b
    linear_silu_mul               silu(linear(x, w_gate)) * linear(x, w_up)
    linear_gelu                   gelu(linear(x, w))

    norm_scale_quant, norm_tanh_mul_add_norm_scale_quant, mul_add_norm_scale_quant, silu_mul_quant
                                  the same, with q and s in place of the last result: q, s = quantised(z)
    gelu_quant                    q, s = quantised(gelu(a))
    quant                         q, s = quantised(x)

The first four ops: x and residual are [..., S, D]. weight and bias are [D] or None. gate, scale and shift are None or
broadcast to x ([D], [1,1,D], [B,1,D], [B,S,D], one element, ...), with any strides. `norm` is "rms" or "layer".
`tanh=False` takes a gate that is already activated, `add_one=False` a scale that already includes the 1. `tanh` is
False by default in mul_add_norm_scale, and True in the others. shift may be left out. `y_dtype` and
`z_dtype` default to the dtypes that PyTorch's type promotion gives the chain.

norm_rope and qk_norm_rope: x and q are [B, S, H, Dh], k is [B, S, Hk, Dh], weights are [Dh] or None. `norm` is "rms" or
"layer". Biases are [Dh] or None, may be left out, and are None with an rms norm. If `sin` is None, the rotation is
complex: [S, Dh/2], [1|B, S, Dh/2] or [1|B, S, 1, Dh/2]. Or it is real and holds 2×2 matrices, with last dimension 2 *
Dh: m00, m01, m10 and m11 of each pair. With `sin`, the rotation holds the cosines and `sin` the sines, with last
dimension Dh or Dh/2. With `interleaved`, a pair is two neighbouring elements, as it always is without `sin`. Otherwise
a pair has one element from each half of a head. With `addcmul`, the second of two real products is not rounded before
the sum.

qk_norm_part_rope: the same, but the rotation and `sin` have S' rows, for the last S' of the S tokens: [S', n],
[1|B, S', n] or [1|B, S', 1, n]. The tokens before are only normed.

qk_norm_cat_rope: as qk_norm_rope with an rms norm, and q_before and k_before are [B, S', H, Dh] and [B, S', Hk, Dh].
Their tokens come first. The rotation is for S' + S tokens. q_before and q have the same dtype, and so have their
weights; the same for k.

norm_all_heads_rope: x is [B, S, D], `heads` heads one after the other; weight is [D] or None; cos and sin are [S, n],
[1|B, S, n] or [1|B, S, 1, n]. n is Dh or Dh/2; if each head has its own rotation (`own`), it is D or D/2.
`interleaved` and `addcmul` are as above.

silu_mul and gelu_quant: a and b are [..., S, D]. `approximate` is that of F.gelu. silu_mul_quant and gelu_quant may be
given `before`, [..., S, E] in the dtype of the result. They then quantise the joined row [before, result], and q is
[..., S, E + D].

linear_silu_mul and linear_gelu: x is [..., S, K], weights are [N, K], biases are [N] or None, and all have one dtype.
`configuration` names a tiling of the kernel, as "128x192/2x1/pingpong". The kernels need quack and two tokens or more.

quant: x is [..., S, D].

An op that quantises returns each row of z in FP8: q, float8_e4m3fn, has the shape of z, and s, float32, is [..., S, 1].
`s_dtype` (z's dtype by default), `fmax`, `smallest_amax`, `smallest_scale`, `reciprocal` and `clamp` are the steps of
dit_kernels.rounding.QuantSteps. These ops have no gradient; a call that needs one raises RuntimeError.

Each op with `_quant` has three overloads. `.keep_z` also returns z, in front of q. `.static` takes `static_scale`, one
element on the device or None, as its last positional argument and returns q without s; `scaling`, `factor_dtype` (fp32
by default), `scaled_dtype` (fp32 by default) and `clamp` are the steps of dit_kernels.rounding.StaticSteps.
`.static_keep_z` does both. None of them takes `before`.

All other results have the shape of x, of q and k (with the tokens of both streams), or of a. Results are newly
allocated and contiguous. Each operand is bfloat16, float16 or float32, independently of the others. A rotation may be
complex64 or complex128. The definition also takes float64.

`rounding` is a form of dit_kernels.rounding, and `root` is one of its ways to compute the root of an rms norm.
dit_kernels.rounding also gives the defaults of the other dtypes: `norm_dtype`, `norm_dtype2` (of the second norm),
`rope_dtype`, `out_dtype` and `silu_dtype`.

Each op with an eps has an overload `.eps_tensor`; that of an overload ends in `_eps_tensor`. It takes eps as a
one-element CPU tensor and reads it on the host.
Bad arguments raise ValueError. The message names the argument, the given value and what was expected.

On the CPU, and if autograd needs a gradient, an op runs its PyTorch definition (dit_kernels.reference). On CUDA it runs
its CuTeDSL kernel, or the definition if the kernel cannot run (no CuTeDSL, a GPU older than sm_80, float64).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _len_torch_dispatch_stack
from torch._C._functorch import peek_interpreter_stack

from dit_kernels.families import OPS, op_of
from dit_kernels.families.family import Call, Op
from dit_kernels.plans import Launch, Plans, can_be_planned, make_launch, no_launch
from dit_kernels.warn import warn_once

MINIMUM_CAPABILITY = (8, 0)

Results = tuple[Tensor, ...]


# --- can a kernel run? ----------------------------------------------------------------------------------------------


@cache
def kernels_missing(device: torch.device) -> str | None:
    """Why no kernel can run on `device`; None if kernels can run."""
    if device.type != "cuda":
        return f"no kernel for device type {device.type}"
    if not torch.cuda.is_available():
        return "no CUDA GPU is available"
    if find_spec("cutlass") is None:
        return "nvidia-cutlass-dsl is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < MINIMUM_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is older than 8.0"
    try:
        _compiler()
    except Exception as error:  # another package named cutlass, or CuTeDSL without a compiler for this driver
        return f"CuTeDSL does not load: {error}"
    return None


def has_kernel(call: Call) -> bool:
    """Can the CuTeDSL kernel run this call?"""
    return kernels_missing(call.first.device) is None and call.fits_kernel()


@cache
def _compiler() -> Any:
    from dit_kernels import compile  # imports cutlass, so not before the first call on a GPU

    return compile


# --- running a call -------------------------------------------------------------------------------------------------


def run(call: Call) -> Results:
    """Runs a call and returns its results."""
    results = call.empty_results()
    run_into(call, results)
    return results


def run_into(call: Call, results: Sequence[Tensor]) -> tuple[Callable[..., None], tuple[int, ...]] | None:
    """Runs a call and writes into existing results, which may be parts of larger tensors.

    Returns the kernel that ran and the numbers that it was launched with. Returns None if the definition ran, or if
    nothing ran because the results are empty.
    """
    if not has_kernel(call):
        _copy(_definition(call), results)
        return None
    if not any(result.numel() for result in results):
        return None
    pairs = zip(call.op.results, results, strict=True)
    if not all(argument.is_written_to(result, call.first.shape) for argument, result in pairs):
        new = call.empty_results()
        run_into(call, new)
        _copy(new, results)
        return None
    operands = call.operands(results)
    if not call.op.family.can_run(operands):
        warn_once(
            f"dit_kernels: {call.op.name} runs as plain PyTorch: its kernel does not take these addresses or strides"
        )
        _copy(call.definition(), results)
        return None
    ran: tuple[Callable[..., None], tuple[int, ...]]
    ran = _compiler().run(call.op.family, call.chain, operands)
    return ran


def _copy(values: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    for result, value in zip(results, values, strict=True):
        result.copy_(value)


def prepare(call: Call) -> None:
    """Compiles the kernel that a call will launch, before the call.

    The arguments may be fake tensors with symbolic sizes. Nothing is read from them, and nothing is launched.
    """
    if has_kernel(call):
        operands = call.operands(call.empty_results(), read_eps=False)
        _compiler().prepare(call.op.family, call.chain, operands)


def checked_call(op: torch._ops.OpOverload, *args: Any, **options: Any) -> Call:
    """The checked arguments of an op of this library. Raises ValueError if the op would."""
    return op_of(op).call(*args, **options)


def _definition(call: Call) -> Results:
    missing = kernels_missing(call.first.device)
    if call.first.is_cuda and missing is not None:
        warn_once(f"dit_kernels: {missing}; the PyTorch definitions run instead")
    return call.definition()


def _run_checked(plans: Plans, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Checks and runs a call on a GPU. Keeps a plan for similar calls, if there is none and they can be planned."""
    call = plans.op.call(*args, **options)
    keep = can_be_planned(args) and not plans.knows(args, options)
    launch: Launch = no_launch
    if has_kernel(call):
        results = call.empty_results()
        ran = run_into(call, results)
        if keep and ran is not None:
            launch = make_launch(call, args, results, *ran)
    else:
        results = _definition(call)
    if keep:
        plans.keep(args, options, launch)
    return _returned(results)


def _returned(results: Results) -> Any:
    return results if len(results) > 1 else results[0]


# --- registration ---------------------------------------------------------------------------------------------------


def _on_cuda(op: Op) -> Callable[..., Any]:
    """The implementation that the dispatcher calls on CUDA."""
    plans = Plans(op)

    def implementation(*args: Any, **options: Any) -> Any:
        planned = plans.run(args, options)
        return _run_checked(plans, args, options) if planned is None else planned

    return implementation


def _autograd(op: Op, registered: torch._ops.OpOverload, definition: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation that the dispatcher calls for autograd.

    If a gradient is needed, the definition runs, which is differentiable. Otherwise the implementation of the device
    runs. If nothing between autograd and the device has to see the call, a plan is launched directly from here. This
    saves a second pass through the dispatcher. A plan is made for a call that needs no gradient, so calls that match
    the plan need none either. An op that quantises has no gradient.
    """
    plans = Plans(op)

    def implementation(*args: Any, **options: Any) -> Any:
        forward = torch.autograd.forward_ad._current_level >= 0
        seen = forward or _len_torch_dispatch_stack() or peek_interpreter_stack() is not None
        planned = None if seen else plans.run(args, options)
        if planned is not None:
            return planned
        backward = is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        if op.quantises and (backward or (forward and any(map(_has_tangent, args)))):
            raise RuntimeError(f"{op.name}: a gradient is needed, and this op has none")
        if forward or backward:
            return definition(*args, **options)
        if not seen and _is_on_gpu(args[0]) and can_be_planned(args):
            return _run_checked(plans, args, options)
        with torch._C._AutoDispatchBelowAutograd():
            return registered(*args, **options)

    return implementation


def _filled(op: Op, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Passes all arguments to an implementation, also those that the caller left out."""
    if not any(argument.defaulted for argument in op.inputs):
        return implementation
    return lambda *args, **options: implementation(*op.filled(args), **options)


def _has_tangent(given: Any) -> bool:
    return isinstance(given, Tensor) and torch.autograd.forward_ad.unpack_dual(given).tangent is not None


def _is_on_gpu(t: Tensor | None) -> bool:
    return t is not None and t.is_cuda


def register(library: torch.library.Library, op: Op) -> None:
    """Registers an op in a library of the namespace dit_kernels; with an eps, also its overload for an eps tensor."""
    OPS[op.name] = op

    def definition(*args: Any, **options: Any) -> Any:
        return _returned(op.call(*args, **options).definition())

    def fake(*args: Any, **options: Any) -> Any:
        return _returned(op.call(*args, **options).empty_results())

    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
    for eps_tensor in (False, True) if op.has_eps else (False,):
        # A CUDA graph would replay the eps of its capture, and Inductor's graphs take no CPU tensor into their pool.
        unsafe, eps = ((torch.Tag.cudagraph_unsafe,), "Tensor?") if eps_tensor else ((), "float?")
        name = op.registered_name(eps_tensor)
        library.define(name + op.schema(eps), tags=tags + unsafe)
        library.impl(name, definition, "CompositeExplicitAutograd")
        library.impl(name, _filled(op, _on_cuda(op)), "CUDA")
        torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)
        library.impl(name, _filled(op, _autograd(op, op.overload(eps_tensor), definition)), "Autograd")


_LIBRARY = torch.library.Library("dit_kernels", "DEF")
for _op in tuple(OPS.values()):
    register(_LIBRARY, _op)
