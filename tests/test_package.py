"""What is installed: the wheel, what importing costs, and the name `kernels`, which belongs to another library."""

from __future__ import annotations

import email.message
import email.parser
import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

pytestmark = pytest.mark.xdist_group("package")

ROOT = Path(__file__).resolve().parents[1]
SOURCES = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])


def run_python(code: str, cwd: Path, *, path: str = SOURCES, python: str = sys.executable) -> str:
    """Runs `code` in a fresh interpreter, with PYTHONPATH=path; its standard output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path:
        environment["PYTHONPATH"] = path
    done = subprocess.run(
        [python, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the sdist, that is built from this tree."""
    for module in ("build", "hatchling"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs the package {module}, of the extra `test`")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return email.parser.Parser().parsestr(archive.read(name).decode())


def test_the_wheel_holds_both_packages_whole_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        path.relative_to(base).as_posix()
        for base, package in ((ROOT, "fusion_pass"), (ROOT / "kernels", "dit_kernels"))
        for path in (base / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == expected
    assert {"fusion_pass/py.typed", "dit_kernels/py.typed", "fusion_pass/backend.py", "dit_kernels/ops.py"} <= names


def test_the_wheel_names_the_backend_for_torch(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        lines = archive.read(name).decode().split("\n")
    assert "[torch_dynamo_backends]" in lines
    assert "fusion_pass = fusion_pass.backend:fusion_pass_backend" in lines


def test_the_metadata_states_what_the_package_needs(metadata: email.message.Message) -> None:
    needed = metadata.get_all("Requires-Dist") or []
    assert metadata["Name"] == "fusion-pass"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    requirements = {parsed.name: parsed for parsed in map(Requirement, needed) if "extra" not in str(parsed.marker)}
    assert set(requirements) == {"torch", "filelock", "rich", "nvidia-cutlass-dsl", "apache-tvm-ffi"}
    assert str(requirements["torch"].specifier) == ">=2.11"
    assert requirements["nvidia-cutlass-dsl"].extras == {"cu13"}
    allowed = requirements["nvidia-cutlass-dsl"].specifier
    assert [allowed.contains(version) for version in ("4.7.1", "4.8.1", "4.9.0", "5.0.0")] == [False, True, True, False]


@pytest.mark.parametrize("package", ["nvidia-cutlass-dsl", "apache-tvm-ffi"])
@pytest.mark.parametrize(
    ("system", "machine", "wanted"),
    [
        ("Linux", "x86_64", True),
        ("Linux", "aarch64", True),
        ("Windows", "AMD64", True),  # as Python names it there
        ("Windows", "ARM64", False),
        ("Linux", "ppc64le", False),
        ("Darwin", "arm64", False),
        ("Darwin", "x86_64", False),
    ],
)
def test_cutedsl_and_tvm_ffi_are_required_where_they_have_wheels(
    metadata: email.message.Message, package: str, system: str, machine: str, wanted: bool
) -> None:
    (requirement,) = (r for r in map(Requirement, metadata.get_all("Requires-Dist") or []) if r.name == package)
    assert requirement.marker is not None
    assert requirement.marker.evaluate({"platform_system": system, "platform_machine": machine}) == wanted


def test_an_installed_wheel_gives_torch_the_backend_by_name_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    fresh, empty = tmp_path / "venv", tmp_path / "empty"
    empty.mkdir()
    venv.create(fresh, with_pip=False, symlinks=True)
    python = str(fresh / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    done = subprocess.run([*pip, str(wheel)], cwd=empty, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    site = Path(
        run_python("import sysconfig; print(sysconfig.get_path('purelib'))", empty, path="", python=python)[:-1]
    )
    # Torch and the rest are not installed again but read where this interpreter has them. A line of a .pth file adds
    # that folder alone, not what its own .pth files would, so that this checkout stays off the path.
    here = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    (site / "dependencies.pth").write_text("\n".join(here) + "\n")
    code = """
import json, torch
backend = torch._dynamo.lookup_backend("fusion_pass")  # before any import of ours
import dit_kernels, fusion_pass
names = ["norm_tanh_mul_add", "norm_tanh_mul_add_norm_scale", "norm_scale"]
ops = [hasattr(torch.ops.dit_kernels, name) for name in names]
print(json.dumps([callable(backend), fusion_pass.__file__, dit_kernels.__file__, ops]))
"""
    found, *files, ops = json.loads(run_python(code, empty, path="", python=python).splitlines()[-1])
    assert found
    assert all(site in Path(file).parents for file in files)
    assert ops == [True, True, True]


def test_importing_loads_neither_cutlass_nor_inductor_and_the_name_kernels_stays_free(tmp_path: Path) -> None:
    """The kernels import no pass, nothing touches CUDA, and diffusers does not take our folder for a package."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = """
import importlib.metadata, importlib.util, json, sys, torch
before = set(sys.modules)
import dit_kernels
by_the_kernels = sorted(set(sys.modules) - before)
import fusion_pass
by_both = sorted(set(sys.modules) - before)
cuda = torch.cuda.is_initialized()
installed = any(d.metadata["Name"] == "kernels" for d in importlib.metadata.distributions())
spec = importlib.util.find_spec("kernels")
free = installed or spec is None or spec.origin is None
taken = installed
if importlib.util.find_spec("diffusers"):
    from diffusers.utils import is_kernels_available
    taken = is_kernels_available()
print(json.dumps([by_the_kernels, by_both, cuda, free, taken == installed]))
"""
    by_the_kernels, by_both, cuda, *names = json.loads(run_python(code, tmp_path).splitlines()[-1])
    assert "dit_kernels" in by_the_kernels
    assert [name for name in by_the_kernels if name.startswith("fusion_pass")] == []
    assert "fusion_pass" in by_both
    heavy = ("cutlass", "tvm_ffi", "cuda", "torch._inductor", "triton")
    assert [name for name in by_both if name.startswith(tuple(f"{module}." for module in heavy)) or name in heavy] == []
    assert not cuda
    assert names == [True, True]


def test_a_real_package_named_kernels_wins_wherever_it_is_on_the_path(tmp_path: Path) -> None:
    (tmp_path / "site" / "kernels").mkdir(parents=True)
    (tmp_path / "site" / "kernels" / "__init__.py").write_text("REAL = True\n")
    site = str(tmp_path / "site")
    # To save time, ours is found and not imported: that would import torch.
    code = "import importlib.util, kernels; print(kernels.REAL, importlib.util.find_spec('dit_kernels').origin)"
    for path in (os.pathsep.join([SOURCES, site]), os.pathsep.join([site, SOURCES])):
        assert run_python(code, tmp_path, path=path).split() == ["True", f"{ROOT}/kernels/dit_kernels/__init__.py"]
