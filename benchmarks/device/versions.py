"""Print the machine and the versions of what matters for speed, as one JSON line."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = (
    "torch", "triton", "numpy", "numba", "transformers", "megatron-core", "transformer-engine", "pyarrow", "rapidfuzz",
)  # fmt: skip


def find_version(package: str) -> str:
    """Return the version of an installed package, "none" of another."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def main() -> None:
    """Print."""
    has_gpu = torch.cuda.is_available()
    figures = {
        "benchmark": "versions",
        "date": datetime.now(UTC).date().isoformat(),
        "gpu": has_gpu,
        "device": torch.cuda.get_device_name() if has_gpu else "cpu",
        "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30 if has_gpu else None,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        **{package: find_version(package) for package in PACKAGES},
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
