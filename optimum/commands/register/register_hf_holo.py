"""Read at every start of `optimum-cli`: `optimum-cli export onnx` then knows the families of hf_holo."""

from optimum.commands.export.onnx import ONNXExportCommand

REGISTER_COMMANDS = []  # there is no command of its own

_run = ONNXExportCommand.run


def run(self) -> None:
    """Register the families, which takes a while to import, and export."""
    from hf_holo.export.onnx_config import register

    register()
    _run(self)


ONNXExportCommand.run = run
