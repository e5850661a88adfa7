"""Runs Python in a process of its own, which imports from this checkout and sees no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_python(folder: Path, *command: str, imports: tuple[Path, ...] = (), **variables: str) -> str:
    """Runs Python in a folder, asserts that it succeeds, and returns its standard output.

    command: the arguments of the interpreter. imports: further folders to import from. variables: further environment
    variables.
    """
    paths = (*map(str, (ROOT, ROOT / "kernels", *imports)), os.environ.get("PYTHONPATH"))
    path = os.pathsep.join(filter(None, paths))
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", **variables},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
