"""The examples run as programs, and fuse every site of the blocks that they compile."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zimage
from graph_checks import but_matmuls
from processes import ROOT, run_python

pytestmark = pytest.mark.xdist_group("examples")

EXAMPLES = ROOT / "examples"


def blocks(count: int, swiglu: str = "linear_silu_mul") -> dict[str, int]:
    """Sites of Z-Image blocks that are compiled one by one."""
    kinds = ("norm_scale", "norm_tanh_mul_add", "norm_tanh_mul_add_norm_scale", "qk_norm_rope", swiglu)
    return dict.fromkeys(kinds, count)


# Runs all examples in one process, because importing diffusers takes long. To save minutes, Inductor stops behind its
# passes and generates no code: PyTorch runs the graph. And Z-Image has one layer and no refiners. The test of the
# benchmark of whole models generates code.
PROGRAM = """
import functools, os, runpy, socket, sys, traceback
from dataclasses import replace
from unittest import mock
import diffusers, torch, zimage, zoo_models
from graph_backend import GraphBackend
from torch._inductor import compile_fx as inductor

inductor.compile_fx = functools.partial(inductor.compile_fx, inner_compile=GraphBackend()._stop_after_passes)
folder, *names = sys.argv[1:]


def run(name):
    torch._dynamo.reset()
    sys.argv = [name, "--json", name + ".json"]
    runpy.run_path(f"{folder}/{name}.py", run_name="__main__")


def compile_layers(model, **options):
    for block in model.layers:
        block.compile(**options)


def run_in_two_processes(name):
    # As torchrun starts them, with the same variables. A fork has what is imported here. To save time, the refiners are
    # not compiled.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    forks = []
    for rank in range(2):
        fork = os.fork()
        if fork == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            try:
                run(name)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        forks.append(fork)
    assert [os.waitpid(fork, 0)[1] for fork in forks] == [0, 0]


if "context_parallel" in names:
    names.remove("context_parallel")
    with mock.patch.object(diffusers.ZImageTransformer2DModel, "compile_repeated_blocks", compile_layers):
        run_in_two_processes("context_parallel")

zimage.SIZES["small"] |= {"n_layers": 1, "n_refiner_layers": 0}
known = zoo_models.MODELS["z-image"]
smaller = {**known.small, "n_refiner_layers": 0}
zoo_models.MODELS["z-image"] = replace(known, layers={"n_layers": 1}, small=smaller)
for name in names:
    print(f"--- {name}", flush=True)
    if name == "zimage":  # run as a program, it would have its own SIZES
        torch._dynamo.reset()
        sys.argv = [name, "--json", name + ".json", "--steps", "1"]
        zimage.main()
    else:
        run(name)
"""


# Follows the program above. Runs examples with --pretrained, and writes what they did. A small transformer stands in
# for the checkpoint. Its pipeline checks that it gets arguments that the real pipeline takes, calls the transformer and
# returns two pictures. Nothing is compiled: the program above does that.
PRETRAINED = """
import inspect, json
from types import SimpleNamespace
import common, flux, quantized_zimage, qwen_image, wan
from PIL import Image

PIPELINES = {
    flux: ("FluxPipeline", "flux1", "images"),
    qwen_image: ("QwenImagePipeline", "qwen-image", "images"),
    wan: ("WanPipeline", "wan2.1", "frames"),
    zimage: ("ZImagePipeline", "z-image", "images"),
    quantized_zimage: ("ZImagePipeline", "z-image", "images"),
}
called, compiled, done = [], [], {}


def pipeline(known, model, inputs, result):
    def call(*args, **given):
        inspect.signature(known).bind(None, *args, **given)
        called.append([*args, given["num_inference_steps"]])
        for _ in range(given["num_inference_steps"]):
            model(**inputs)
        pictures = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
        return SimpleNamespace(**{result: [pictures] if result == "frames" else pictures})

    call.transformer, call.transformer_2, call.to = model, None, lambda device: call
    return call


torch.nn.Module.compile = lambda module, backend, **_: compiled.append((module, backend.kernels))
for module, (name, model, result) in PIPELINES.items():
    made = pipeline(getattr(diffusers, name).__call__, *common.small_model(model), result)
    getattr(diffusers, name).from_pretrained = lambda path, made=made, **_: made
    explained = []
    common.fusion_pass.explain = lambda *inputs, **named: explained.append(inputs) or common.fusion_pass.FusionReport()
    called.clear(), compiled.clear()
    output = module.__name__ + ".gif"
    sys.argv = [name, "--pretrained", "checkpoint", "--prompt", "fog", "--steps", "3", "--output", output]
    module.main()
    with Image.open(output) as picture:
        pictures = picture.n_frames
    transformers = [(model is made.transformer, kernels) for model, kernels in compiled]
    done[module.__name__] = [len(explained), transformers, called[0], called[-1], pictures]
with open("pretrained.json", "w") as file:
    json.dump(done, file)
"""


@dataclass
class Result:
    written: dict[str, Any]  # with --json
    printed: str


NEEDED = {"quantized_zimage": ("torchao",), "lora_offload": ("peft", "accelerate")}
NEEDED_BY_PRETRAINED = ("torchao", "transformers")
TWO_PROCESSES = torch.distributed.is_available() and hasattr(os, "fork")


def installed(packages: tuple[str, ...]) -> bool:
    return all(map(importlib.util.find_spec, packages))


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """The results of all examples whose packages are installed."""
    names = ["flux", "qwen_image", "wan", "regional_compile", "quantized_zimage", "lora_offload", "zimage", "comfyui"]
    names = [name for name in names if installed(NEEDED.get(name, ()))]
    if TWO_PROCESSES:
        names.append("context_parallel")
    program, outputs = PROGRAM, list(names)
    if installed(NEEDED_BY_PRETRAINED):
        program += PRETRAINED
        outputs.append("pretrained")
    folder = tmp_path_factory.mktemp("examples")
    imports = (EXAMPLES, ROOT / "tests")  # in this order: both have a module zimage
    variables = {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "COLUMNS": "80"}
    text = run_python(folder, "-c", program, str(EXAMPLES), *names, imports=imports, HF_HUB_OFFLINE="1", **variables)
    printed = dict(part.split("\n", 1) for part in text.split("--- ")[1:])
    return {name: Result(json.loads((folder / f"{name}.json").read_text()), printed.get(name, "")) for name in outputs}


EXPECTED = {
    "flux": {"mul_add_norm_scale": 2, "norm_scale": 4, "qk_norm_cat_rope": 1, "qk_norm_rope": 1, "linear_gelu": 3},
    "qwen_image": {"mul_add_norm_scale": 2, "norm_scale": 2, "qk_norm_rope": 2, "linear_gelu": 1},
    "wan": {"mul_add_norm_scale": 3, "norm_scale": 1, "norm_all_heads_rope": 2, "linear_gelu": 2},
    # In one of three equal blocks.
    "regional_compile": {"mul_add_norm_scale": 2, "norm_scale": 2, "qk_norm_rope": 2, "linear_gelu": 2},
    # The results of its matmuls are scaled.
    "quantized_zimage": but_matmuls(zimage.expected_counts(layers=1, refiners=0)),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_small_models_are_explained_and_compared_with_eager(name: str, examples: dict[str, Result]) -> None:
    for package in NEEDED.get(name, ()):
        pytest.importorskip(package)
    result = examples[name].written
    assert result["fused"] == EXPECTED[name]
    assert result["graphs"] == 1
    assert 0 <= result["distance"] < 0.05
    assert examples[name].printed.count("from eager: ") == 1
    assert name != "regional_compile" or result["calls"] == [3]


def test_the_demo_measures_and_ends_with_what_to_do_next(examples: dict[str, Result]) -> None:
    result, text = examples["zimage"].written, examples["zimage"].printed
    assert set(result["results"]) == {"eager", "torch.compile", 'backend="fusion_pass"'}
    counted = [site["kind"] for site in result["report"]["fused"]]
    assert {kind: counted.count(kind) for kind in counted} == zimage.expected_counts(layers=1, refiners=0)
    lines = text.splitlines()
    assert "\x1b" not in text  # a log has no colours, no bar and a line for each step
    assert [line for line in lines if line.endswith(" ...")][-1] == "timing 1 steps of each ..."
    assert [line.partition(":")[0] for line in lines[-4:-1]] == ["In your program", "What it fuses", "More"]
    tables = [line for line in lines if not line.startswith(("The CUDA kernels", "wrote"))]
    assert max(map(len, tables)) <= 100
    assert "…" not in text  # no cell is cut off
    assert (EXAMPLES / "zimage.py").read_text().endswith('if __name__ == "__main__":\n    main()\n')


def test_a_lora_and_offload_cost_no_fusion(examples: dict[str, Result]) -> None:
    for package in NEEDED["lora_offload"]:
        pytest.importorskip(package)
    result = examples["lora_offload"].written
    assert result["graphs"] == 1
    assert result["fused"] == blocks(1, swiglu="silu_mul")  # the LoRA is added to the layers in front of it
    assert 0 <= result["distance"] < 0.05


def test_the_pipelines_are_called_as_diffusers_defines_them_and_what_they_make_is_saved(
    examples: dict[str, Result],
) -> None:
    for package in NEEDED_BY_PRETRAINED:
        pytest.importorskip(package)
    done = examples["pretrained"].written
    assert len(done) == 5
    for name, (explained, compiled, first, last, pictures) in done.items():
        assert explained == 1, name
        assert compiled == [[True, "reference"]], name
        assert (first, last) == (["fog", 1], ["fog", 3]), name
        assert pictures == 2, name


def test_blocks_in_comfyuis_style_are_fused(examples: dict[str, Result]) -> None:
    result = examples["comfyui"].written
    assert result["fused"] == {"norm_scale": 1, "norm_tanh_mul_add": 1, "norm_tanh_mul_add_norm_scale": 3}
    assert result["graphs"] == 1
    assert result["distance"] < 0.05


@pytest.mark.skipif(not TWO_PROCESSES, reason="needs torch.distributed and os.fork")
def test_a_model_split_over_two_processes_is_fused_in_each(examples: dict[str, Result]) -> None:
    result = examples["context_parallel"].written
    assert result["processes"] == 2
    # The block that splits, and the one that gathers: diffusers' hooks are compiled with them.
    # What attends are all heads of some tokens, so that q and k are exchanged, each for itself.
    expected = blocks(2)
    expected["norm_rope"] = 2 * expected.pop("qk_norm_rope")
    assert result["fused"] == expected
    assert result["distance"]["split"] < 0.05
    assert result["distance"]["split and compiled"] < 0.05


def test_the_comfyui_node_compiles_a_clone_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    helpers = SimpleNamespace(
        set_torch_compile_wrapper=lambda model, **options: calls.append({"model": model, **options})
    )
    monkeypatch.setitem(sys.modules, "comfy_api", SimpleNamespace(torch_helpers=helpers))
    monkeypatch.setitem(sys.modules, "comfy_api.torch_helpers", helpers)
    monkeypatch.syspath_prepend(EXAMPLES)
    import comfyui

    class Patcher:
        def clone(self) -> str:
            return "the clone"

    (node,) = comfyui.NODE_CLASS_MAPPINGS.values()
    assert getattr(node(), node.FUNCTION)(Patcher()) == ("the clone",)
    (call,) = calls
    assert call["model"] == "the clone"
    assert call["backend"] == "fusion_pass"
