"""The full-size Z-Image on the GPU: what is fused, how far from eager, how much memory. Compilations are shared."""

from __future__ import annotations

import gc
import importlib.util
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from graph_checks import but_matmuls
from torch import Tensor

pytest.importorskip("diffusers")
import fusion_pass

LAYERS, REFINERS = 30, 2


@pytest.fixture(scope="module")
def example() -> ModuleType:
    """examples/zimage.py, which makes the model and its inputs."""
    path = Path(__file__).resolve().parents[2] / "examples" / "zimage.py"
    sys.path.append(str(path.parent))  # behind tests/, which has a module of the same name
    spec = importlib.util.spec_from_file_location("zimage_example", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    importlib.import_module("common").register_backend()
    return module


@pytest.fixture(scope="module", autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@dataclass
class Run:
    output: Tensor
    peak: int


@dataclass
class Model:
    """The model, its inputs, and a way to run it."""

    example: ModuleType
    module: torch.nn.Module
    inputs: tuple[Any, ...]

    def run(self, step: Callable[..., Any]) -> Run:
        """The second output of `step` (the first call compiles), and the peak memory of that call."""
        self.example.run_step(step, self.inputs)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        output = self.example.run_step(step, self.inputs).float()
        return Run(output, torch.cuda.max_memory_allocated())


@pytest.fixture(scope="module")
def zimage(example: ModuleType) -> Iterator[Model]:
    """The published size: 30 layers and 2 refiners of width 3840, at 1024 x 1024."""
    module = example.build_model("full", "cuda")
    assert (len(module.layers), len(module.noise_refiner)) == (LAYERS, REFINERS)
    yield Model(example, module, example.build_inputs(module, 1024, 1024, 128, 1))
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def eager(zimage: Model) -> Run:
    return zimage.run(zimage.module)


@pytest.fixture(scope="module")
def report(zimage: Model, eager: Run) -> Any:
    return fusion_pass.explain(zimage.module, *zimage.inputs, return_dict=False)


@pytest.fixture(scope="module")
def plain(zimage: Model, eager: Run) -> Run:
    return zimage.run(torch.compile(zimage.module))


@pytest.fixture(scope="module")
def fused(zimage: Model, eager: Run) -> Run:
    return zimage.run(torch.compile(zimage.module, backend="fusion_pass"))


def distance(run: Run, reference: Run) -> float:
    return float((run.output - reference.output).norm() / reference.output.norm())


def test_every_residual_add_attention_and_swiglu_of_the_full_model_is_fused(report: Any) -> None:
    kinds = but_matmuls(Counter(site.kind for site in report.fused))
    blocks = LAYERS + 2 * REFINERS
    assert kinds == {
        "norm_tanh_mul_add_norm_scale": 2 * blocks - 3,
        "norm_tanh_mul_add": 3,
        "norm_scale": 3,
        "qk_norm_rope": blocks,
        "silu_mul": blocks,
    }, str(report)
    assert report.graphs == 1


def test_every_fused_site_names_its_module_its_source_line_and_its_rounding(report: Any) -> None:
    for site in report.fused:
        assert site.module
        assert "transformer_z_image.py:" in site.source or "normalization.py:" in site.source
        assert site.rounding == ("model" if site.kind.endswith("silu_mul") else "cast_then_weight")
        assert str(site.dtype).endswith("bfloat16")


def test_the_fused_model_is_no_further_from_eager_than_plain_compile(eager: Run, plain: Run, fused: Run) -> None:
    assert torch.isfinite(fused.output).all()
    assert distance(fused, eager) <= 1.05 * distance(plain, eager)


def test_the_fused_model_takes_no_more_memory_than_plain_compile(plain: Run, fused: Run) -> None:
    assert fused.peak <= plain.peak + 2**20 * 32, f"{fused.peak / 2**30:.3f} GiB, plain {plain.peak / 2**30:.3f} GiB"


def test_reduce_overhead_captures_and_gives_the_result_of_the_default_mode(example: ModuleType) -> None:
    """At full width and the real sequence length, two layers deep: a graph replays the same kernels at any depth."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    full = example.SIZES["full"]
    example.SIZES["shallow"] = full | {"n_layers": 2, "n_refiner_layers": 1}
    try:
        module = example.build_model("shallow", "cuda")
    finally:
        del example.SIZES["shallow"]
    model = Model(example, module, example.build_inputs(module, 1024, 1024, 128, 1))
    model.run(module)
    default = model.run(torch.compile(module, backend="fusion_pass"))
    skips = counters["inductor"]["cudagraph_skips"]
    step = torch.compile(module, backend="fusion_pass", mode="reduce-overhead")
    for _ in range(3):  # a warm-up, the capture, replays
        replayed = model.run(step)
        assert torch.equal(replayed.output, default.output), f"relative distance {distance(replayed, default):.2e}"
    assert counters["inductor"]["cudagraph_skips"] == skips
    torch._dynamo.reset()
