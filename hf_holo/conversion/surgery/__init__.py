"""Layer surgery: linear layers become holographic (plan, apply), fitted to activations (calibration, refit); attention
becomes holographic mixers (transfer)."""

from .apply import HoloQuantizer, SurgeryReport, apply_surgery, restore_linears
from .plan import HoloSurgeryConfig
from .quantize import quantize_linears

__all__ = [
    "HoloQuantizer",
    "HoloSurgeryConfig",
    "SurgeryReport",
    "apply_surgery",
    "quantize_linears",
    "restore_linears",
]
