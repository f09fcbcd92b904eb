"""transformers' own tests, from the source distribution of the release that is installed: its wheel has none."""

import importlib
import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import transformers
from filelock import FileLock

PACKAGE = "transformers_tests"
FOLDER = Path(sys.prefix) / "share" / f"transformers-{transformers.__version__}"
PIP = ["-m", "pip", "download", "--quiet", "--no-deps", "--no-build-isolation", "--no-binary", "transformers"]

# What the shipped files import and the source distribution leaves out: the tests of generation and of exporters, and
# a list of config arguments.
STAND_INS = {
    "generation/test_utils.py": "class GenerationTesterMixin: ...\n",
    "exporters/test_export.py": "class ExportTesterMixin: ...\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}


def shipped(module: str) -> ModuleType:
    """One file of the tests, for example "test_modeling_common"; they are fetched once and kept next to the packages.

    Raises:
        subprocess.CalledProcessError: pip does not get the source distribution; `stderr` says why.
        OSError: there is no room for it.
    """
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{FOLDER}.lock"):
        if not FOLDER.is_dir():
            _fetch()
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))
    return importlib.import_module(f"{PACKAGE}.{module}")


def _fetch() -> None:
    with TemporaryDirectory(dir=FOLDER.parent) as work:
        wanted = f"transformers=={transformers.__version__}"
        subprocess.run([sys.executable, *PIP, "--dest", work, wanted], check=True, capture_output=True, text=True)
        (archive,) = Path(work).glob("*.tar.gz")
        with tarfile.open(archive) as file:
            file.extractall(work, filter="data")
        tests = Path(work, FOLDER.name, "tests")
        for name, text in STAND_INS.items():
            (tests / name).parent.mkdir()
            (tests / name).write_text(text)
            (tests / name).with_name("__init__.py").touch()
        (tests / "__init__.py").touch()
        kept = Path(work, "kept")
        kept.mkdir()
        tests.rename(kept / PACKAGE)
        kept.rename(FOLDER)
