"""Shows that a change to the kernels' source leaves the compiled code alone. Needs no GPU.

    python kernels/benchmarks/compare_ptx.py dump before.json          # in the checkout before the change
    python kernels/benchmarks/compare_ptx.py dump after.json           # in the checkout with the change
    python kernels/benchmarks/compare_ptx.py compare before.json after.json [--record results.json]

`dump` compiles every kernel of the tables VARIANTS in tests/test_kernel_code.py and tests/test_attention_kernel_code.py
for every architecture, and writes a hash of its PTX and one of the host code that launches it; with --ptx the PTX, too.
`record` runs tests (tests/ptx, or the pytest arguments that follow) and writes the hashes of all kernels that they
compile. Hypothesis draws the same examples each time: from seed 0, whatever the source of a test is. `compare` lists
what differs between two such files, and exits with 1 if the PTX of a kernel does. A new argument of a family changes
the host code of all its kernels, and no PTX.

The names of kernels are left out of the hashes, because CuTeDSL makes them from the names of modules and classes. The
version of the compiler is part of them.
"""

from __future__ import annotations

import argparse
import base64
import difflib
import gzip
import hashlib
import json
import re
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "kernels"), str(ROOT)]
DIFF_LINES = 40

Kernel = dict[str, str]


def normalised(ptx: str) -> str:
    """PTX with the name of the kernel, and of its parameters after it, replaced by `kernel`."""
    (name,) = re.findall(r"\.entry\s+([\w$]+)", ptx)
    return ptx.replace(name, "kernel")


def normalised_host(lines: list[str] | tuple[str, ...]) -> str:
    return re.sub(r"@(cutlass|kernels)_\w+", "@kernel", "\n".join(lines))


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def described(ptx: str, host: list[str] | tuple[str, ...], keep_ptx: bool = False) -> Kernel:
    text = normalised(ptx)
    kernel = {"sha256": sha256(text), "host_sha256": sha256(normalised_host(host))}
    return kernel | {"ptx": base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()} if keep_ptx else kernel


def text_of(kernel: Kernel) -> list[str]:
    return gzip.decompress(base64.b64decode(kernel["ptx"])).decode().splitlines()


def dump(keep_ptx: bool) -> dict[str, Kernel]:
    """The kernels of the tables, by <table>/<name>/<architecture>."""
    import test_attention_kernel_code
    import test_kernel_code
    from ptx.device import compiled

    kernels = {}
    for table in (test_kernel_code, test_attention_kernel_code):
        for name, variant in table.VARIANTS.items():
            for arch in test_kernel_code.COMPILED:
                kernel = compiled(arch, variant)
                kernels[f"{table.__name__}/{name}/{arch}"] = described(kernel.ptx, kernel.host, keep_ptx)
    return kernels


class Recorder:
    """A pytest plugin that notes each kernel that the interpreter's tests compile, by <architecture>/<hashes>."""

    def __init__(self, keep_ptx: bool) -> None:
        self.keep_ptx = keep_ptx
        self.test = ""
        self.kernels: dict[str, Kernel] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        from hypothesis import is_hypothesis_test, seed
        from ptx import device

        for item in items:
            if is_hypothesis_test(test := getattr(item, "obj", None)):
                seed(0)(test)
        compile_variant = device.compile_variant

        def recorded(arch: str, *others: Any) -> Any:
            compiled = compile_variant(arch, *others)
            kernel = described(compiled.__ptx__, device.host_function(str(compiled.ir_module)), self.keep_ptx)
            key = f"{arch}/{kernel['sha256'][:24]}/{kernel['host_sha256'][:24]}"
            self.kernels.setdefault(key, {**kernel, "test": self.test})
            return compiled

        device.compile_variant = recorded

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.test = nodeid


def record(arguments: list[str], keep_ptx: bool) -> dict[str, Kernel]:
    recorder = Recorder(keep_ptx)
    status = pytest.main(["--rootdir", str(ROOT), *(arguments or [str(ROOT / "tests/ptx")])], plugins=[recorder])
    if status != pytest.ExitCode.OK:
        print("not all tests passed: a failing test may not have compiled all of its kernels", file=sys.stderr)
    return recorder.kernels


def environment() -> dict[str, Any]:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    git = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": git.stdout.strip() or "unknown",
        "versions": {name: version(name) for name in ("torch", "nvidia-cutlass-dsl", "apache-tvm-ffi")},
    }


def compare(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """How many kernels are equal, and the names of the others; prints what differs."""
    old, new = before["kernels"], after["kernels"]
    common = sorted(old.keys() & new.keys())
    parts = ("sha256", "host_sha256")
    different = [key for key in common if any(old[key][part] != new[key][part] for part in parts)]
    only_before, only_after = sorted(old.keys() - new.keys()), sorted(new.keys() - old.keys())
    for key in different:
        what = [
            name for name, part in zip(("PTX", "host code"), parts, strict=True) if old[key][part] != new[key][part]
        ]
        print(f"different: {key}: {' and '.join(what)}")
        if "ptx" in old[key] and "ptx" in new[key]:
            diff = difflib.unified_diff(text_of(old[key]), text_of(new[key]), "before", "after", n=1, lineterm="")
            print("\n".join(islice(diff, DIFF_LINES)))
    for where, keys, kernels in (("before", only_before, old), ("after", only_after, new)):
        for key in keys:
            print(f"only {where}: {key} {kernels[key].get('test', '')}".rstrip())
    equal = len(common) - len(different)
    host_only = [key for key in different if old[key]["sha256"] == new[key]["sha256"]]
    different = [key for key in different if key not in host_only]
    print(f"{equal} equal, {len(host_only)} with other host code, {len(different)} with other PTX,", end=" ")
    print(f"{len(only_before)} only before, {len(only_after)} only after")
    differing = {"different_ptx": different, "only_before": only_before, "only_after": only_after}
    return {"equal": equal, "equal_but_for_host_code": len(host_only), **differing}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, purpose in (("dump", "the kernels of the tables"), ("record", "the kernels that tests compile")):
        command = commands.add_parser(name, help=purpose)
        command.add_argument("out", type=Path)
        command.add_argument("--ptx", action="store_true", help="keep the PTX, so that `compare` can show a diff")
    commands.choices["record"].add_argument("arguments", nargs=argparse.REMAINDER, help="for pytest")
    command = commands.add_parser("compare", help="two files of `dump` or of `record`")
    command.add_argument("before", type=Path)
    command.add_argument("after", type=Path)
    command.add_argument("--record", type=Path, help="a json file to add the outcome to")
    given = parser.parse_args()

    if given.command != "compare":
        kernels = dump(given.ptx) if given.command == "dump" else record(given.arguments, given.ptx)
        found = {"of": "tables" if given.command == "dump" else "tests", **environment(), "kernels": kernels}
        given.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        print(f"{len(kernels)} kernels in {given.out}")
        return
    before, after = (json.loads(path.read_text()) for path in (given.before, given.after))
    outcome = compare(before, after)
    if given.record:
        results = json.loads(given.record.read_text()) if given.record.exists() else {}
        ends = {
            name: {key: end[key] for key in ("commit", "date", "versions")}
            for name, end in (("before", before), ("after", after))
        }
        results[after["of"]] = {**ends, **outcome}
        given.record.parent.mkdir(parents=True, exist_ok=True)
        given.record.write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(bool(outcome["different_ptx"] or outcome["only_before"] or outcome["only_after"]))


if __name__ == "__main__":
    main()
