"""Environments in which packages of others are installed next to this one."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import hf_holo


def python_with(package: Path, root: Path) -> Path:
    """The interpreter of a new environment below `root` that sees this one's packages and has `package` installed."""
    venv.create(root / "env", symlinks=os.name != "nt")
    scheme = {"base": str(root / "env"), "platbase": str(root / "env")}
    site_packages = Path(sysconfig.get_path("purelib", "venv", scheme))
    shared = (sysconfig.get_path("purelib"), Path(hf_holo.__file__).parents[1])
    (site_packages / "shared.pth").write_text("".join(f"{path}\n" for path in shared))
    python = Path(sysconfig.get_path("scripts", "venv", scheme)) / Path(sys.executable).name
    install = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation", package]
    subprocess.run(install, check=True, capture_output=True, text=True)
    return python
