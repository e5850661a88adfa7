"""The backend among others: threads, resets, caches, grad modes, changing shapes, other passes, LoRA, training."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
import zimage
from graph_backend import GraphBackend, run
from site_modules import SiteModule, Spec, diffusers_norm, inputs
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import fresh_cache
from torch.fx.passes.split_module import split_module
from torch.utils.checkpoint import checkpoint

import fusion_pass
from fusion_pass import Backend

REFERENCE = Backend(kernels="reference")
DUAL = "norm_tanh_mul_add_norm_scale"


@pytest.fixture
def module() -> SiteModule:
    torch.manual_seed(0)
    return SiteModule(Spec()).eval().requires_grad_(False)


@pytest.fixture
def args() -> tuple[Tensor, ...]:
    return inputs(Spec())


@pytest.fixture(autouse=True)
def _fresh_caches():
    counters.clear()
    with fresh_cache():
        yield


def assert_equal(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# --- processes, threads, caches ---------------------------------------------------------------------------------------


def test_two_threads_compile_two_models_with_different_options_at_once(args) -> None:
    models = [SiteModule(Spec()).eval().requires_grad_(False) for _ in range(2)]
    backends = [REFERENCE, Backend(rounding="fp32", kernels="reference")]
    alone = []
    for model, backend in zip(models, backends, strict=True):
        torch._dynamo.reset()
        alone.append(torch.compile(model, backend=backend)(*args))
    torch._dynamo.reset()
    counters.clear()
    start = Barrier(2)

    def compile_and_run(model: nn.Module, backend: Backend) -> tuple[Tensor, ...]:
        start.wait()
        return torch.compile(model, backend=backend)(*args)

    with ThreadPoolExecutor(2) as threads:
        together = list(threads.map(compile_and_run, models, backends))
    for got, expected in zip(together, alone, strict=True):
        assert_equal(got, expected)
    assert_equal(together[0], models[0](*args))
    assert counters["fusion_pass"][DUAL] == 2


def test_after_a_reset_a_model_is_compiled_and_fused_again(module, args) -> None:
    compiled = torch.compile(module, backend=REFERENCE)
    for count in (1, 2):
        torch.compiler.reset()
        assert_equal(compiled(*args), module(*args))
        assert counters["fusion_pass"][DUAL] == count


# --- grad modes and training ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", (torch.no_grad, torch.inference_mode))
def test_a_model_with_parameters_that_want_gradients_is_fused_where_no_gradient_is_recorded(mode, args) -> None:
    model = SiteModule(Spec()).eval()
    with mode():
        assert_equal(torch.compile(model, backend=REFERENCE, fullgraph=True)(*args), model(*args))
    assert counters["fusion_pass"][DUAL] == 1


@pytest.mark.usefixtures("without_code")
def test_one_compiled_model_serves_inference_and_training_in_turns(args) -> None:
    model = SiteModule(Spec(dtype=torch.float32))
    args = tuple(arg.float() for arg in args)
    compiled = torch.compile(model, backend=REFERENCE)
    for _ in range(2):
        with torch.no_grad():
            assert_equal(compiled(*args), model(*args))
        torch.testing.assert_close(gradients(compiled, args), gradients(model, args))
    assert counters["fusion_pass"][DUAL] == 1  # that of the inference graph


def gradients(model: nn.Module, args: tuple[Tensor, ...]) -> list[Tensor]:
    leaves = [arg.detach().requires_grad_() for arg in args]
    loss = sum(result.float().square().sum() for result in model(*leaves))
    return list(torch.autograd.grad(loss, [*leaves, *model.parameters()]))


class Checkpointed(SiteModule):
    """Its forward stands inside the backward graph once more."""

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        return checkpoint(super().forward, *args, use_reentrant=False)


@pytest.mark.usefixtures("without_code")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("kind", (SiteModule, Checkpointed))
def test_gradients_in_training_are_those_of_plain_torch_compile(kind, dtype) -> None:
    torch.manual_seed(0)
    args = inputs(Spec(dtype=dtype))
    model = kind(Spec(dtype=dtype)).train()
    got = gradients(torch.compile(model, backend=REFERENCE), args)
    torch._dynamo.reset()
    expected = gradients(torch.compile(model), args)
    assert_equal(got, expected)
    assert counters["fusion_pass"]["graphs"] == 2  # forward and backward
    assert counters["fusion_pass"][DUAL] == 0


# --- changing shapes --------------------------------------------------------------------------------------------------


def compilations(model: nn.Module, backend: object, dynamic: bool | None, calls: list[tuple[Tensor, ...]]) -> int:
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, backend=backend, dynamic=dynamic)
    with torch.no_grad():
        for args in calls:
            compiled(*args)
    return counters["stats"]["unique_graphs"]


@pytest.mark.usefixtures("without_code")
@pytest.mark.parametrize(("dynamic", "expected"), ((None, 2), (True, 1), (False, 3)))
def test_another_number_of_tokens_compiles_no_more_than_plain_inductor(module, dynamic, expected) -> None:
    calls = [inputs(Spec(tokens=tokens)) for tokens in (6, 9, 33)]
    assert compilations(module, REFERENCE, dynamic, calls) == expected
    assert counters["fusion_pass"][DUAL] == expected
    assert compilations(module, "inductor", dynamic, calls) == expected


# --- other people's passes and settings -------------------------------------------------------------------------------


def test_our_pass_reads_the_graph_that_a_users_own_pass_has_made(module, args) -> None:
    def sigmoid_for_tanh(graph: torch.fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.tanh.default):
            node.target = torch.ops.aten.sigmoid.default

    hook = {"post_grad_custom_pre_pass": sigmoid_for_tanh}
    with torch._inductor.config.patch(hook):
        _, backend = run(module, *args)
        got = torch.compile(module, backend=REFERENCE)(*args)
        assert torch._inductor.config.post_grad_custom_pre_pass is sigmoid_for_tanh
    assert [(site.kind, site.gate) for site in backend.report.fused] == [(DUAL, "given")]
    x, residual, gate, _ = args
    y = residual + gate.sigmoid() * diffusers_norm(x, module.weight)
    torch.testing.assert_close(got[0], y, rtol=0, atol=2**-6)  # Inductor's sigmoid is fp32 inside
    assert not torch.equal(got[0], module(*args)[0])


HOOKS = ("pre_grad_custom_pass", "joint_custom_pre_pass", "joint_custom_post_pass", "post_grad_custom_post_pass")


@pytest.mark.usefixtures("without_code")
def test_passes_in_inductors_other_hooks_run_as_they_do_without_us(module, args) -> None:
    seen: dict[object, list[str]] = {}
    for backend in (REFERENCE, "inductor"):
        torch._dynamo.reset()
        names = seen[backend] = []
        with torch._inductor.config.patch({hook: lambda graph, h=hook, n=names: n.append(h) for hook in HOOKS}):
            torch.compile(module, backend=backend)(*args)
    assert seen[REFERENCE] == seen["inductor"]
    assert sorted(seen["inductor"]) == sorted(HOOKS)


class Manager(CustomGraphPass):
    """As vLLM's: one object that runs a list of passes, and stands in the hook behind Inductor's own passes."""

    def __init__(self) -> None:
        self.graphs: list[list[str]] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.graphs.append([str(node.target) for node in graph.nodes])

    def uuid(self) -> str:
        return "manager"


def test_a_model_that_is_split_and_compiled_by_pieces_with_a_manager_of_passes_as_vllm_does(module, args) -> None:
    manager = Manager()
    options = {"post_grad_custom_post_pass": manager, "combo_kernels": False, "max_autotune": False}
    config = fusion_pass.inductor_options(kernels="reference", options=options)

    def piecewise(gm: torch.fx.GraphModule, example_inputs: list[Tensor]) -> object:
        (y,) = [node for node in gm.graph.nodes if node.name == "y"]
        split = split_module(gm, None, lambda node: int(y < node))
        for name, piece in split.named_children():
            setattr(split, name, Lazily(piece, config))
        return split

    got = torch.compile(module, backend=piecewise)(*args)
    assert_equal(got, module(*args))
    assert len(manager.graphs) == 2
    assert ["dit_kernels.norm_tanh_mul_add.default" in graph for graph in manager.graphs] == [True, False]
    assert ["dit_kernels.norm_scale.default" in graph for graph in manager.graphs] == [False, True]


class Lazily(nn.Module):
    """Compiles a piece for the arguments that it is first called with."""

    def __init__(self, piece: torch.fx.GraphModule, config: dict[str, object]) -> None:
        super().__init__()
        self.piece, self.config, self.compiled = piece, config, None

    def forward(self, *args: Tensor) -> object:
        if self.compiled is None:
            self.compiled = compile_fx(self.piece, args, config_patches=self.config)
        return self.compiled(*args)


class Constants(nn.Module):
    """A site whose weights, gate and scale are all parameters."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)
        self.weight, self.gate, self.scale = (nn.Parameter(torch.randn(32)) for _ in range(3))
        self.to(dtype)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        y = residual + self.gate[None, None].tanh() * diffusers_norm(self.linear(x), self.weight)
        return y, diffusers_norm(y, self.weight) * (1 + self.scale[None, None])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_frozen_weights_are_constants_of_the_graph_and_the_site_is_fused(dtype) -> None:
    torch.manual_seed(0)
    model = Constants(dtype).eval()
    x, residual = torch.randn(2, 2, 6, 32, dtype=dtype)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        got = torch.compile(model, backend=REFERENCE)(x, residual)
        expected = model(x, residual)
    assert counters["fusion_pass"][DUAL] == 1
    torch.testing.assert_close(got, expected)  # freezing packs the linear's weight for another matmul


# --- other things of torch around a site ------------------------------------------------------------------------------


@torch.compiler.nested_compile_region
def region(module: nn.Module, *args: Tensor) -> tuple[Tensor, ...]:
    return module(*args)


def in_a_nested_region(module: nn.Module, *args: Tensor) -> tuple[Tensor, ...]:
    y, z = region(module, *args)
    return region(module, z, y, *args[2:])


def in_a_branch(module: nn.Module, x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    return torch.cond(x.sum() > 0, lambda x: module(x, *rest), lambda x: module(-x, *rest), (x,))


def under_vmap(module: nn.Module, *args: Tensor) -> tuple[Tensor, ...]:
    return torch.func.vmap(module)(*args)


@pytest.mark.parametrize(("around", "fused"), ((in_a_nested_region, 1), (in_a_branch, 2), (under_vmap, 1)))
def test_a_site_is_fused_wherever_its_graph_stands(around, fused: int, module, args) -> None:
    got, backend = run(around, module, *args)
    assert_equal(got, around(module, *args))
    assert backend.report.counts() == {DUAL: fused}


# --- LoRA -------------------------------------------------------------------------------------------------------------


def test_a_lora_that_is_added_switched_off_and_merged_keeps_every_site_of_a_block_fused() -> None:
    peft = pytest.importorskip("peft")
    transformer = zimage.model(layers=1, refiners=0)
    (block,) = transformer.layers
    called: list[tuple[tuple, dict]] = []
    hook = block.register_forward_pre_hook(lambda _, *given: called.append(given), with_kwargs=True)
    zimage.run(transformer, zimage.inputs())
    hook.remove()
    ((args, named),) = called
    targets = ["to_q", "to_out.0", "w2"]
    with torch.no_grad():
        base = block(*args, **named)
    transformer.add_adapter(peft.LoraConfig(r=4, init_lora_weights=False, target_modules=targets))
    transformer.eval()
    backend = GraphBackend()
    compiled = torch.compile(block, backend=backend)
    sites = ("norm_scale", "norm_tanh_mul_add", "norm_tanh_mul_add_norm_scale", "qk_norm_rope", "linear_silu_mul")

    def check(graphs: int) -> Tensor:
        with torch.no_grad():
            expected = block(*args, **named)
            assert torch.equal(compiled(*args, **named), expected)
        assert backend.report.counts() == dict.fromkeys(sites, graphs)
        return expected

    assert not torch.equal(check(1), base)
    transformer.disable_adapters()
    assert torch.equal(check(2), base)
    transformer.enable_adapters()
    transformer.fuse_lora()
    check(3)
