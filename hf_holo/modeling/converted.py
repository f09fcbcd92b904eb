"""Where a converted checkpoint (a `Phi3ForCausalLM` with holographic layers, say) finds its code without this package.

It goes with such a checkpoint, and its config names it: loading registers the quantizer, and the class that the config
asks for is transformers' own under the same name.
"""

from typing import Any

import transformers
from transformers.quantizers.auto import (
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)

from .quantizer import PlanQuantizer, SurgeryPlan
from .remote_code import auto_classes_of

if "holo" not in AUTO_QUANTIZER_MAPPING:  # hf_holo, or another checkpoint, may have been here before
    register_quantization_config("holo")(SurgeryPlan)
    register_quantizer("holo")(PlanQuantizer)


def __getattr__(name: str) -> Any:
    """transformers' class of this name, as one that takes its code along when it is saved again."""
    base = None if name.startswith("_") else getattr(transformers, name, None)
    if base is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    auto_class = next(iter(auto_classes_of(name)), None)
    globals()[name] = made = type(name, (base,), {"__module__": __name__, "_auto_class": auto_class})
    return made
