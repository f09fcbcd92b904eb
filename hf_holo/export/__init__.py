"""Models out of Python: ONNX through Optimum, torch.export, TorchScript and int8, for every registered family."""

from pathlib import Path


def standalone_script() -> Path:
    """The script that writes text with an ONNX export and needs neither torch nor transformers."""
    return Path(__file__).with_name("standalone.py")
