"""Holographic and resonant models for Hugging Face transformers.

Importing the package registers its families with the Auto classes; the modeling files are read when first needed.
"""

import functools
import importlib
from typing import Any

from .modeling.configuration_hsn import HsnConfig
from .modeling.tokenization_holo import HoloTokenizer
from .registry import PRESETS, VARIANTS, architectures, load_plugins, preset_model, register_architecture

__version__ = "0.1.0"

_HSN = f"{__name__}.modeling.modeling_hsn"

register_architecture(
    name="hsn",
    config=HsnConfig,
    models={
        "AutoModel": f"{_HSN}:HsnModel",
        "AutoModelForCausalLM": f"{_HSN}:HsnForCausalLM",
        "AutoModelForMaskedLM": f"{_HSN}:HsnForMaskedLM",
        "AutoModelForSequenceClassification": f"{_HSN}:HsnForSequenceClassification",
        "AutoModelForTokenClassification": f"{_HSN}:HsnForTokenClassification",
    },
    presets=PRESETS / "hsn",
    variants=VARIANTS / "hsn.json",
    tokenizer=HoloTokenizer,
)

# Public names that are imported when first asked for, by module. The registry adds the model classes and, for each
# preset, a function that makes its model: `hsn_tiny(vocab_size=...)`.
_LAZY = {
    "errors": ["HoloError"],
    "modeling.cache": ["RecurrentCache"],
    "modeling.layers": ["GatedChannelMix", "LiteChannelMix", "RotaryEmbedding", "SpectralGate"],
    "modeling.mixers": ["HolographicMixer"],
    "modeling.modeling_hsn": ["HoloSpectralBlock", "fft_circular_conv", "fft_circular_corr"],
    "modeling.ops": ["bind", "unbind"],
    "registry": ["Architecture", "Preset", "get_architecture", "preset_config", "presets"],
    "training.optim": ["MuonAdamW"],
}
_ORIGIN = {name: f"{__name__}.{module}" for module, names in _LAZY.items() for name in names}
for _architecture in architectures().values():
    _ORIGIN.update(reversed(path.split(":")) for path in _architecture.models.data.values())
    for _preset in _architecture.presets:
        globals()[_preset.replace("-", "_")] = functools.partial(preset_model, _preset)


def __getattr__(name: str) -> Any:
    if name not in _ORIGIN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(_ORIGIN[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_ORIGIN})


load_plugins()  # last: plug-ins import this package
