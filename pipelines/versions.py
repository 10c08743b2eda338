"""Which software and hardware made an artefact."""

import importlib.metadata
import platform
import subprocess
from functools import cache
from pathlib import Path

PACKAGES = ("sae-pipelines", "torch", "numpy", "zarr", "transformers", "ray", "safetensors", "pyarrow")


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter, and the git commit where this is a checkout."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    commit = git_commit()
    if commit:
        found["git_commit"] = commit
    return found


CPU_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
    "sve",
)
"""Features of a CPU by which matrix products choose their kernels, and so the last bits of their results."""


@cache
def machine() -> dict[str, str]:
    """Name of this machine, its CPU, and which of `CPU_FLAGS` that has."""
    found = {"host": platform.node(), "cpu": platform.processor() or platform.machine()}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return found
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    found["cpu"] = facts.get("model name", found["cpu"])
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    found["cpu_flags"] = " ".join(flag for flag in CPU_FLAGS if flag in flags)
    return found


def git_commit() -> str | None:
    """Commit of the checkout that this file is in, with `+` when files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        head = subprocess.run(
            ["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        )
        dirty = subprocess.run(
            ["git", "-C", root, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")
