"""Versions, git state and hardware, which run.json records."""

import platform
import subprocess
from importlib.metadata import version
from typing import Any

import explain2me


def versions(*more: str) -> dict[str, str]:
    """Versions of the main packages and of ``more``."""
    packages = ("torch", "torchvision", "timm", "numpy", "pyarrow", "pillow", *more)
    own = {"explain2me": explain2me.__version__, "python": platform.python_version()}
    return own | {name: version(name) for name in packages}


def provenance(*more: str) -> dict[str, Any]:
    """Versions of the main packages and of ``more``, git state, and kind of hardware."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "versions": versions(*more),
        "git": _git_state(),
        "hardware": {"device": device, "system": platform.system()},
    }


def _git_state() -> dict[str, Any] | None:
    """Commit of the current folder, and whether it has changes; None outside git."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()  # noqa: S603

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None
