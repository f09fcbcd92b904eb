"""One form of a model into another: layer surgery, distillation, transfer."""

from .surgery import (
    HoloQuantizer,
    HoloSurgeryConfig,
    SurgeryReport,
    apply_surgery,
    quantize_linears,
    restore_linears,
)

__all__ = [
    "HoloQuantizer",
    "HoloSurgeryConfig",
    "SurgeryReport",
    "apply_surgery",
    "quantize_linears",
    "restore_linears",
]
