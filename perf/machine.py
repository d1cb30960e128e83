"""Where a measurement comes from."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from barkstream import __version__

ROOT = Path(__file__).resolve().parents[1]


def machine(*packages: str) -> dict[str, Any]:
    """CPU, cores, load at the end of the run, Python, commit, and the versions of `packages`."""
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "python": platform.python_version(),
        "commit": subprocess.run(describe, capture_output=True, text=True).stdout.strip(),
        "barkstream": __version__,
        **{package: version(package) for package in packages},
    }
