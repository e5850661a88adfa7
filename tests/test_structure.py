"""The structure of the project: who may import whom, and that a new fusion is one file and one line."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from graph_backend import run
from toy_family import RELU_MUL
from toy_kind import RELU, ReluMulKind

from dit_kernels import ops
from dit_kernels.families import OPS
from fusion_pass.graph_pass import FusionPass
from fusion_pass.kinds import REGISTRY

ROOT = Path(__file__).parents[1]
PACKAGES = {"fusion_pass": ROOT / "fusion_pass", "dit_kernels": ROOT / "kernels/dit_kernels"}


# --- a family and a kind from outside ---------------------------------------------------------------------------------


@pytest.fixture
def toy_op() -> Iterator[Any]:
    """torch.ops.dit_kernels.relu_mul."""
    library = torch.library.Library("dit_kernels", "FRAGMENT")
    ops.register(library, RELU_MUL)
    yield torch.ops.dit_kernels.relu_mul
    library._destroy()
    del OPS[RELU_MUL.name]


@pytest.fixture
def toy_kind(toy_op: Any) -> Iterator[ReluMulKind]:
    kind = ReluMulKind()
    REGISTRY.register(RELU, kind)
    yield kind
    REGISTRY.unregister(kind)


def relu_mul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.relu() * b


def test_a_family_from_one_file_is_an_op_with_a_fake_gradients_and_errors(toy_op: Any) -> None:
    a, b = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    assert torch.equal(toy_op(a, b), relu_mul(a, b))
    torch.library.opcheck(toy_op.default, (a, b))
    torch.library.opcheck(toy_op.default, (a.bfloat16(), b), {"out_dtype": torch.float16})
    bias = torch.randn(8)
    assert torch.equal(toy_op(a, b, bias=bias), relu_mul(a, b) + bias)
    torch.library.opcheck(toy_op.default, (a, b, bias))
    args = [t.double().requires_grad_() for t in (a, b)]
    assert torch.autograd.gradcheck(toy_op, args)
    with pytest.raises(ValueError, match=r"relu_mul: b\.shape is \[2, 3, 4\], expected \[2, 3, 8\], the shape of a"):
        toy_op(a, b[..., :4])


@pytest.mark.parametrize("dynamic", (False, True))
def test_a_kind_from_one_file_is_found_rewritten_and_reported(toy_kind: ReluMulKind, dynamic: bool) -> None:
    a, b = torch.randn(2, 3, 8).bfloat16(), torch.randn(2, 3, 8).bfloat16()
    got, backend = run(relu_mul, a, b, dynamic=dynamic)
    assert torch.equal(got, relu_mul(a, b))
    assert backend.count(torch.ops.dit_kernels.relu_mul.default) == 1
    assert backend.report.counts() == {"relu_mul": 1}


def test_what_a_kind_from_one_file_refuses_is_reported(toy_kind: ReluMulKind) -> None:
    a, b = torch.randn(2, 3, 8), torch.randn(8)
    got, backend = run(relu_mul, a, b)
    assert torch.equal(got, relu_mul(a, b))
    assert [(site.kind, site.reason_name) for site in backend.report.missed] == [("relu_mul", "SHAPE")]


def test_the_kinds_and_families_that_are_registered_are_a_part_of_the_key_of_inductors_caches(toy_op: Any) -> None:
    before, kind = FusionPass().uuid(), ReluMulKind()
    REGISTRY.register(RELU, kind)
    with_toy = FusionPass().uuid()
    REGISTRY.unregister(kind)
    assert before != with_toy
    assert before == FusionPass().uuid()
    with mock.patch.dict(OPS):
        del OPS["relu_mul"]
        assert before != FusionPass().uuid()


# --- imports ----------------------------------------------------------------------------------------------------------


def _modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def _imports(path: Path, modules: dict[str, Path]) -> set[str]:
    """The modules of ours that a file imports, also inside functions and for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names if names <= modules.keys() else names | {node.module}
    return found & modules.keys()


MODULES = _modules()
IMPORTS = {name: _imports(path, MODULES) for name, path in MODULES.items()}

RULES = {
    "the kernels know nothing of the compiler side": ("dit_kernels", "fusion_pass"),
    "device code knows no family, no op and no definition": (
        "dit_kernels.cute",
        ("dit_kernels.families", "dit_kernels.ops", "dit_kernels.compile", "dit_kernels.reference"),
    ),
    "a kind knows sites and dataflow, never the pass": (
        "fusion_pass.kinds",
        (
            "fusion_pass.graph_pass",
            "fusion_pass.backend",
            "fusion_pass.report",
            "fusion_pass.proof",
            "fusion_pass.rewrite",
            "fusion_pass.eligibility",
            "fusion_pass.lowering",
        ),
    ),
    "the vocabulary of graphs knows no site": ("fusion_pass.dataflow", ("fusion_pass.site", "fusion_pass.kinds")),
    "sites, proof and rewrite know no kind": ("fusion_pass.site", "fusion_pass.kinds"),
    "the proof knows no kind": ("fusion_pass.proof", "fusion_pass.kinds"),
    "the rewrite knows no kind": ("fusion_pass.rewrite", "fusion_pass.kinds"),
    "eligibility knows no kind": ("fusion_pass.eligibility", "fusion_pass.kinds"),
    "the lowering knows no kind and not the pass": (
        "fusion_pass.lowering",
        ("fusion_pass.kinds", "fusion_pass.graph_pass"),
    ),
    "the report knows no graph": (
        "fusion_pass.report",
        ("fusion_pass.site", "fusion_pass.kinds", "fusion_pass.dataflow"),
    ),
}


def _is_in(module: str, packages: str | tuple[str, ...]) -> bool:
    packages = (packages,) if isinstance(packages, str) else packages
    return any(module == package or module.startswith(f"{package}.") for package in packages)


@pytest.mark.parametrize("rule", RULES)
def test_imports_run_one_way(rule: str) -> None:
    importer, forbidden = RULES[rule]
    assert any(_is_in(name, importer) for name in MODULES), "the rule is about no module"
    wrong = {name: [m for m in imported if _is_in(m, forbidden)] for name, imported in IMPORTS.items()}
    assert {name: found for name, found in wrong.items() if found and _is_in(name, importer)} == {}


def test_no_module_imports_itself_by_way_of_others_not_even_inside_a_function() -> None:
    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        pending = [start]
        while pending:
            for imported in IMPORTS[pending.pop()] - seen:
                seen.add(imported)
                pending.append(imported)
        return seen

    assert [name for name in MODULES if name in reached(name)] == []


GENERIC = (
    "fusion_pass.eligibility",
    "fusion_pass.graph_pass",
    "fusion_pass.kinds.kind",
    "fusion_pass.lowering",
    "fusion_pass.prepare",
    "fusion_pass.proof",
    "fusion_pass.refusal",
    "fusion_pass.rewrite",
    "fusion_pass.site",
    "dit_kernels.arguments",
    "dit_kernels.compile",
    "dit_kernels.direct",
    "dit_kernels.families.family",
    "dit_kernels.kernel_cache",
    "dit_kernels.ops",
    "dit_kernels.plans",
    "dit_kernels.tickets",
)
# Roles are called eps and bias; "a" ends the name of an architecture.
ALLOWED = {
    "dit_kernels.arguments": {"bias", "eps"},
    "dit_kernels.compile": {"a"},
}


@pytest.mark.parametrize("module", GENERIC)
def test_generic_code_names_no_argument_and_no_op(module: str) -> None:
    """It asks for the role of an argument instead."""
    arguments = {argument.name for op in OPS.values() for argument in op.family.arguments}
    names = (arguments | {name for op in OPS.values() for name in op.roles} | set(OPS)) - ALLOWED.get(module, set())
    tree = ast.parse(MODULES[module].read_text())
    documented = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    strings = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in documented}
    assert strings & names == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_imports_neither_cutlass_nor_inductor_nor_initialises_cuda(package: str) -> None:
    program = (
        f"import sys, torch; before = set(sys.modules); import {package}\n"
        "new = set(sys.modules) - before\n"
        "print([m for m in new if m.split('.')[0] in ('cutlass', 'tvm_ffi') or m.startswith('torch._inductor')])\n"
        "print(torch.cuda.is_initialized())\n"
    )
    path = [str(ROOT), str(ROOT / "kernels")]
    result = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path}\n{program}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split("\n")[:2] == ["[]", "False"]
