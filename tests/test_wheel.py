"""The package without its sources: a wheel, installed into an environment of its own, trains, checks and exports."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import transformers

ROOT = Path(__file__).resolve().parents[1]
# `pip wheel` leaves its work in the folder of the sources; this builds from a copy of what git tracks.
COPY = "git ls-files -z | xargs -0 tar -c | tar -x -C {}"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def bin_folder(tmp_path_factory) -> Path:
    """The commands of a fresh environment that has the wheel, and the packages of this one but for ours."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "sources").mkdir()
    subprocess.run(COPY.format(folder / "sources"), shell=True, cwd=ROOT, check=True)
    pip = [sys.executable, "-m", "pip", "--quiet"]
    built = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, folder / "sources"]
    subprocess.run([*pip, *built], check=True)
    (wheel,) = folder.glob("*.whl")
    environment = folder / "environment"
    venv.create(environment, with_pip=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    # as a plain path: the file by which this environment finds our sources is not read there
    (environment / "lib" / version / "site-packages" / "others.pth").write_text(sysconfig.get_paths()["purelib"])
    install = [environment / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-deps", wheel]
    subprocess.run(install, check=True)
    return environment / "bin"


def run(*command: object, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_the_wheel_that_is_imported(bin_folder, tmp_path):
    where = run(bin_folder / "python", "-c", "import hf_holo; print(hf_holo.__file__)", cwd=tmp_path)
    assert str(bin_folder.parent) in where and str(ROOT) not in where


def test_it_trains_checks_and_exports(bin_folder, tmp_path):
    short = ["--max_steps", 2, "--per_device_train_batch_size", 2, "--block_size", 32, "--output_dir", "run"]
    run(bin_folder / "hf-holo", "train", *short, "--use_cpu", "--report_to", "none", cwd=tmp_path)
    assert ", 0 failed" in run(bin_folder / "hf-holo", "check", "hsn-tiny", "--quick", cwd=tmp_path).splitlines()[-1]
    run(bin_folder / "hf-holo", "list", cwd=tmp_path)
    if transformers.__version__.startswith("4."):
        optimum = [
            bin_folder / "python",
            "-c",
            "from optimum.commands.optimum_cli import main; main()",
            "export",
            "onnx",
        ]
        run(*optimum, "--model", "run", "--task", "text-generation-with-past", "out", cwd=tmp_path)
        assert (tmp_path / "out" / "model.onnx").is_file()
