"""python -m fusion_pass: shows what the package finds on this machine, or clears the cache of compiled kernels."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from dit_kernels import kernel_cache
from fusion_pass.environment import as_text, environment, size_text


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m fusion_pass", description=__doc__)
    parser.add_argument("--clear-cache", action="store_true", help="delete the compiled kernels on disk, nothing else")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    if args.clear_cache:
        try:
            removed = kernel_cache.clear()
        except (OSError, kernel_cache.Unusable) as error:
            sys.exit(f"error: {error}")
        text = f"deleted {removed.files} kernels in {removed.directory}: {size_text(removed.bytes)} freed"
        print(json.dumps({"deleted": asdict(removed)}, indent=2) if args.json else text)
    else:
        found = environment()
        print(json.dumps(found, indent=2) if args.json else as_text(found))


if __name__ == "__main__":
    main()
