"""torch.ops.dit_kernels.*: registration, fake implementations, dispatch.

    norm_tanh_mul_add             y = residual + tanh(gate) * norm(x)
    norm_tanh_mul_add_norm_scale  the same y, and z = norm(y) * (1 + scale)
    norm_scale                    z = norm(x) * (1 + scale)
    norm_rope                     rotate(norm(x)) of heads
    qk_norm_rope                  the same of q and of k, with one rotation
    silu_mul                      silu(a) * b

Shapes of the gated norms: x and residual [..., S, D]; weight and bias [D] or None; gate and scale None or anything that
broadcasts to x ([D], [1,1,D], [B,1,D], [B,S,D], one element, ...), with any strides. `norm` is "rms" or "layer";
`tanh=False` takes a gate that is activated already, `add_one=False` a scale that holds its 1 already. `y_dtype` and
`z_dtype` default to what PyTorch's promotion gives the chain.
Of norm_rope and qk_norm_rope: x and q [B, S, H, Dh], k [B, S, Hk, Dh], weights [Dh] or None, an rms norm. The rotation
is complex, `sin` None: [S, Dh/2], [1|B, S, Dh/2] or [1|B, S, 1, Dh/2]; or it is the cosines, with `sin` beside them, of
last dimension Dh or Dh/2. `interleaved` pairs neighbours, as complex numbers always do, else the halves of a head.
Of silu_mul: a and b [..., S, D].

Results are fresh and contiguous, of the shape of x, q and k, a. dtypes: bfloat16, float16 and float32, each operand its
own, and complex64 or complex128 rotations; float64 in the definition. `rounding` is a form of dit_kernels.rounding,
`root` a spelling of an rms norm's root there; it also says what the other dtypes (`norm_dtype`, and
`norm_dtype2` of the second norm, `rope_dtype`, `out_dtype`, `silu_dtype`) are by default.
Each op with an eps has an overload `.eps_tensor`, which takes it as a one-element CPU tensor and reads it on the host.
Bad arguments raise ValueError, which names the argument, what came and what was expected.

On CPU, and where autograd needs a gradient, an op runs its PyTorch definition (dit_kernels.reference); on CUDA, its
CuTeDSL kernel, or the definition where that cannot run (no CuTeDSL, a GPU older than sm_80, float64).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache, reduce
from importlib.util import find_spec
from operator import itemgetter, or_
from typing import Any, NamedTuple

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _len_torch_dispatch_stack
from torch._C._dynamo.guards import TensorGuards
from torch._C._functorch import peek_interpreter_stack

from dit_kernels.calls import norm_gate, norm_rope, silu_mul
from dit_kernels.calls.call import KERNEL_DTYPES as KERNEL_DTYPES  # noqa: PLC0414  for those who build calls
from dit_kernels.calls.call import Call, Op

MINIMUM_CAPABILITY = (8, 0)
ALIGNMENT = 16  # bytes: of every tensor that a kernel is launched on without looking at it again

OPS: dict[str, Op] = {**norm_gate.OPS, **norm_rope.OPS, **silu_mul.OPS}


# --- the ways to run a Call: each gives the results in order --------------------------------------------------------


def _run_cuda(call: Call) -> tuple[Tensor, ...]:
    if not has_kernel(call):
        missing = kernels_missing(call.like().device)
        if missing is not None:
            _warn_once(f"dit_kernels: {missing}; the PyTorch definitions run instead")
        return call.definition()
    results = call.empty_results()
    _run_kernel(call, results)
    return results


def _run_kernel(call: Call, results: tuple[Tensor, ...]) -> None:
    if any(result.numel() for result in results):
        _compiler().run(call.chain, *call.operands(results))


def run_into(call: Call, results: tuple[Tensor, ...]) -> None:
    """Runs a call into results that are there already: what `call.empty_results()` would be."""
    if has_kernel(call):
        _run_kernel(call, results)
        return
    run = _run_cuda if call.like().is_cuda else type(call).definition
    for result, value in zip(results, run(call), strict=True):
        result.copy_(value)


def kernel_of(call: Call, results: tuple[Tensor, ...]) -> Callable[..., None]:
    """The kernel that a call runs."""
    function: Callable[..., None] = _compiler().bound(call.chain, *call.operands(results))[0]
    return function


# --- which kernels there are ----------------------------------------------------------------------------------------


@cache
def kernels_missing(device: torch.device) -> str | None:
    """Why no kernel can run on `device`, or None where one can."""
    if device.type != "cuda":
        return f"no kernel for device type {device.type}"
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
    return kernels_missing(call.like().device) is None and call.fits_kernel()


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


@cache
def _compiler() -> Any:
    from dit_kernels import compile  # imports cutlass: only now, at the first call on a GPU

    return compile


# --- plans: what was checked and found out for one call is not again for the next like it ---------------------------

_Plan = Callable[[tuple[Any, ...], Sequence[Tensor]], Any]
_Pick = Callable[[tuple[Any, ...]], tuple[Any, ...]]
_address = Tensor.data_ptr
# Of calls that differ in metadata only: a shape that changes with every call must not cost more each time.
_MOST_PLANS = 8
_PLAIN = (Tensor, torch.nn.Parameter)


class _Kept(NamedTuple):
    """The plans for calls whose arguments are of the same types."""

    tensors_of: _Pick
    plans: list[tuple[TensorGuards, _Plan]]


_plans: dict[tuple[Any, ...], _Kept] = {}
_UNKNOWN = object()


def _kind(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    return (name, is_grad_enabled(), *map(type, args), *kwargs.items())


def _planned(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The results of a call that is like one before; _UNKNOWN if there was none, None if no plan can run it."""
    kept = _plans.get(_kind(name, args, kwargs))
    if kept is not None:
        tensors = kept.tensors_of(args)
        for guards, plan in kept.plans:
            if guards.check(*tensors):
                return plan(args, tensors)
    return _UNKNOWN


def _no_plan(args: tuple[Any, ...], tensors: Sequence[Tensor]) -> None:
    """The plan for calls that can have none, kept so that this is found out once, where guards can tell such calls."""


def _keep_plan(name: str, op: Op, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Makes a plan for calls like this one.

    Dynamo's guards compare all that checking and the choice of a kernel depend on: dtype, device, sizes, strides,
    requires_grad and dispatch keys. They do not tell of forward gradients, nor of every mode. `name` stands for the op
    and for the level of the dispatcher, on which the keys depend.
    """
    positions = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
    tensors = [args[i] for i in positions]
    plain = all(a is None or a.__class__ is float or a.__class__ in _PLAIN for a in args)
    # Guards do not tell of alignment, and take no tensor twice.
    odd = any(not t.numel() or t.is_neg() or t.is_conj() or t.data_ptr() % ALIGNMENT for t in tensors)
    if not plain or odd or len(set(map(id, tensors))) < len(tensors):
        return
    call = op.make_call(*args, **kwargs)
    plan = _make_plan(op, call, args) if has_kernel(call) else _no_plan
    sizes: Any = [list(t.shape) for t in tensors]  # for Dynamo some could be None: any size
    strides: Any = [list(t.stride()) for t in tensors]
    guards = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    if guards.check(*tensors):
        plans = _plans.setdefault(_kind(name, args, kwargs), _Kept(_picking(positions), [])).plans
        plans[_MOST_PLANS - 1 :] = []
        plans.insert(0, (guards, plan))


def _make_plan(op: Op, call: Call, args: tuple[Any, ...]) -> _Plan:
    """Runs calls like this one. There is none where the kernel reads a copy of an argument."""
    results = call.empty_results()
    operands = call.operands(results)
    read = [a for a in args if isinstance(a, Tensor)]
    addresses = [t.data_ptr() for t in operands if isinstance(t, Tensor)]
    if sorted(addresses) != sorted(t.data_ptr() for t in (*read, *results)):
        return _no_plan
    function, numbers = _compiler().bound(call.chain, *operands)
    device, metadata = results[0].get_device(), [(tuple(r.shape), r.stride(), r.dtype) for r in results]
    several = len(results) > 1
    empty = torch._C._dynamo.guards._empty_strided_cuda  # type: ignore[attr-defined]
    current_device, stream_of = torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream
    of_launch = op.family.of_launch
    arranged, floats_of = _arranged(op, args, len(results))

    def plan(args: tuple[Any, ...], tensors: Sequence[Tensor]) -> Any:
        if current_device() != device:
            with torch.cuda.device(device):
                return plan(args, tensors)
        addresses = [*map(_address, tensors)]
        if reduce(or_, addresses) % ALIGNMENT:
            return None
        results = [empty(*of_one) for of_one in metadata]  # on the current device
        given = arranged((*addresses, *map(_address, results), *floats_of(args), None, 0.0))
        stream = stream_of(device)
        function(*given, *numbers, *of_launch(device, stream, numbers[0]), stream)
        return tuple(results) if several else results[0]

    return plan


def _arranged(op: Op, args: tuple[Any, ...], results: int) -> tuple[_Pick, _Pick]:
    """Two functions. Of addresses of tensors, of results, floats, None and 0, in this order: the kernel's arguments. Of
    the op's arguments: the floats."""
    floats = [i for i, a in enumerate(args) if a.__class__ is float]
    tensors = [i for i, a in enumerate(args) if isinstance(a, Tensor)]
    first_float = len(tensors) + results
    absent = first_float + len(floats)
    places = {i: n for n, i in enumerate(tensors)} | {i: first_float + n for n, i in enumerate(floats)}
    given = [places.get(i) for i in range(len(args))] + [len(tensors) + n for n in range(results)]
    order = [absent if i is None else absent + 1 if i.__class__ is float else i for i in op.arranged(given)]
    return _picking(order), _picking(floats)


def _picking(positions: Sequence[int]) -> _Pick:
    """Of a tuple, what stands at these positions."""
    if len(positions) > 1:
        return itemgetter(*positions)
    return itemgetter(slice(positions[0], positions[0] + 1) if positions else slice(0))


def _cuda(name: str, op: Op) -> Callable[..., Any]:
    level = f"{name}, on CUDA"
    run = _results(_run_cuda, op.make_call)

    def implementation(*args: Any, **kwargs: Any) -> Any:
        planned = _planned(level, args, kwargs)
        if planned is not None and planned is not _UNKNOWN:
            return planned
        results = run(*args, **kwargs)
        if planned is _UNKNOWN:
            _keep_plan(level, op, args, kwargs)
        return results

    return implementation


# --- registration ---------------------------------------------------------------------------------------------------


def checked_call(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Call:
    """The arguments of an op of this library as a Call. Raises ValueError where the op would."""
    return OPS[op._opname].make_call(*args, **kwargs)


def prepare(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> None:
    """Compiles the kernels that `op(*args, **kwargs)` will launch, ahead of the first call.

    The arguments may be fake tensors, with symbolic sizes; nothing is read from them and nothing is launched.
    """
    call = checked_call(op, *args, **kwargs)
    if has_kernel(call):
        _compiler().prepare(call.chain, *call.operands(call.empty_results(), read_eps=False))


def _results(run: Callable[[Any], tuple[Tensor, ...]], make_call: Callable[..., Call]) -> Callable[..., Any]:
    def implementation(*args: Any, **kwargs: Any) -> Any:
        results = run(make_call(*args, **kwargs))
        return results if len(results) > 1 else results[0]

    return implementation


def _autograd(
    registered: torch._ops.OpOverload, name: str, op: Op, definition: Callable[..., Any]
) -> Callable[..., Any]:
    """Runs the definition, which differentiates, where a gradient is wanted; else what the device has.

    A plan is run from here, where nothing between autograd and the device is there to see the call: that saves a second
    way through the dispatcher. It was made for a call that wanted no gradient, so one like it wants none.
    """

    def implementation(*args: Any, **kwargs: Any) -> Any:
        forward = torch.autograd.forward_ad._current_level >= 0
        seen = _len_torch_dispatch_stack() or peek_interpreter_stack() is not None
        planned = None if forward or seen else _planned(name, args, kwargs)
        if planned is not None and planned is not _UNKNOWN:
            return planned
        if forward or (is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)):
            return definition(*args, **kwargs)
        if planned is _UNKNOWN and args[0] is not None and args[0].is_cuda:
            _keep_plan(name, op, args, kwargs)
        with torch._C._AutoDispatchBelowAutograd():
            return registered(*args, **kwargs)

    return implementation


def _register(library: torch.library.Library) -> None:
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
    for name, op in OPS.items():
        definition = _results(lambda call: call.definition(), op.make_call)
        fake = _results(lambda call: call.empty_results(), op.make_call)
        for overload, eps in (("", "float"), (".eps_tensor", "Tensor")) if "{eps}" in op.schema else (("", ""),):
            # A CUDA graph would keep the eps of its capture, and Inductor's graphs take no CPU tensor into their pool.
            unsafe = (torch.Tag.cudagraph_unsafe,) if overload else ()
            library.define(name + overload + op.schema.format(eps=eps), tags=tags + unsafe)
            library.impl(name + overload, definition, "CompositeExplicitAutograd")
            library.impl(name + overload, _cuda(name, op), "CUDA")
            torch.library.register_fake(f"{library.ns}::{name}{overload}", fake, lib=library)
            registered = getattr(getattr(torch.ops.dit_kernels, name), overload[1:] or "default")
            library.impl(name + overload, _autograd(registered, name, op, definition), "Autograd")


_LIBRARY = torch.library.Library("dit_kernels", "DEF")
_register(_LIBRARY)
