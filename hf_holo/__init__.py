"""Holographic and resonant models for Hugging Face transformers.

Importing the package registers its families with the Auto classes; the modeling files are read when first needed.
"""

import functools
import importlib
import warnings
from typing import Any

# Before all else: its processors make transformers 5.24 put another module in its own place, and the one that was there
# is what the user has imported.
from .modeling.versions import REMEDY, VERSION, in_use, is_newer_than_tested

# isort: split
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from . import moved, peft_defaults
from .conversion.surgery.apply import HoloQuantizer
from .conversion.surgery.plan import HoloSurgeryConfig
from .hub.saving import write_missing_card
from .modeling.configuration_holo import HoloConfig
from .modeling.configuration_hsn import HsnConfig
from .modeling.configuration_resonance import ResonanceConfig
from .modeling.configuration_resonance_audio import ResonanceAudioConfig
from .modeling.configuration_resonance_multimodal import ResonanceMultimodalConfig
from .modeling.configuration_resonance_vision import ResonanceVisionConfig
from .modeling.remote_code import card_writers
from .modeling.tokenization_holo import HoloTokenizer
from .references import INSTEAD, stand_in
from .registry import PRESETS, VARIANTS, architectures, load_plugins, preset_model, register_architecture

__version__ = VERSION
if is_newer_than_tested():
    warnings.warn(f"{in_use()}: a later release than any tested; if something is wrong, {REMEDY}", stacklevel=2)

IMAGE_HEADS = {
    "AutoModelForImageClassification": "ForImageClassification",
    "AutoModel": "Model",
    "AutoBackbone": "Backbone",
}
AUDIO_HEADS = {
    "AutoModelForAudioClassification": "ForAudioClassification",
    "AutoModel": "Model",
    "AutoModelForAudioFrameClassification": "ForAudioFrameClassification",
    "AutoModelForPreTraining": "Autoencoder",
}
MULTIMODAL_HEADS = {
    "AutoModelForSequenceClassification": "ForSequenceClassification",
    "AutoModel": "Model",
    "AutoModelForZeroShotImageClassification": "ForContrastive",
}
HEADS = ("Model", "ForCausalLM", "ForMaskedLM", "ForSequenceClassification", "ForTokenClassification")


def _register_text_family(name: str, config: type) -> None:
    """Register a family that has all heads for text, each in the module and under the name that one expects."""
    prefix = f"{__name__}.modeling.modeling_{name}:{name.capitalize()}"
    register_architecture(
        name=name,
        config=config,
        models={f"AutoModel{head.removeprefix('Model')}": f"{prefix}{head}" for head in HEADS},
        presets=PRESETS / name,
        variants=VARIANTS / f"{name}.json",
        tokenizer=HoloTokenizer,
    )


def _register_sense(name: str, config: type, heads: dict[str, str], **parts: Any) -> None:
    """Register a family of pictures, sounds or several senses.

    Args:
        heads: names of Auto classes to what its models are called behind the name of the family; the first is what
            presets are made into.
        parts: arguments of [`register_architecture`] for what prepares inputs, by their names in the processing file.
    """
    module, processing = (f"{__name__}.modeling.{kind}_{name}" for kind in ("modeling", "processing"))
    prefix = config.__name__.removesuffix("Config")
    own: dict[str, Any] = {part: f"{processing}:{name_of_class}" for part, name_of_class in parts.items()}
    register_architecture(
        name=name,
        config=config,
        models={auto: f"{module}:{prefix}{head}" for auto, head in heads.items()},
        presets=PRESETS / name,
        variants=VARIANTS / f"{name}.json",
        **own,
    )


def install() -> None:
    """Tell transformers and PEFT what is in this package: all that its import changes elsewhere. Twice is as once."""
    _register_text_family("hsn", HsnConfig)
    _register_text_family("holo", HoloConfig)
    _register_text_family("resonance", ResonanceConfig)
    _register_sense("resonance_vision", ResonanceVisionConfig, IMAGE_HEADS, image_processor="ResonanceImageProcessor")
    _register_sense("resonance_audio", ResonanceAudioConfig, AUDIO_HEADS, feature_extractor="ResonanceFeatureExtractor")
    _register_sense(
        "resonance_multimodal",
        ResonanceMultimodalConfig,
        MULTIMODAL_HEADS,
        processor="ResonanceProcessor",
    )

    peft_defaults.offer_adapters("hsn", outputs=["k_proj", "v_proj"], inputs=["up_proj", "down_proj"])
    peft_defaults.offer_adapters("holo", outputs=["k_proj", "v_proj"], inputs=["down_proj"])
    peft_defaults.offer_adapters("resonance", outputs=["in_proj"], inputs=["up_proj", "down_proj"])
    peft_defaults.offer_adapters("resonance_vision", outputs=["gate_proj"], inputs=["down_proj"])
    peft_defaults.offer_adapters("resonance_audio", outputs=["in_proj"], inputs=["up_proj", "down_proj"])
    peft_defaults.offer_adapters(
        "resonance_multimodal", outputs=["in_proj", "gate_proj"], inputs=["up_proj", "down_proj"]
    )
    peft_defaults.install()
    moved.install()

    AUTO_QUANTIZATION_CONFIG_MAPPING["holo"] = HoloSurgeryConfig  # in place of those of a checkpoint's own code, too
    AUTO_QUANTIZER_MAPPING["holo"] = HoloQuantizer
    if write_missing_card not in card_writers:
        card_writers.append(write_missing_card)


install()

# Public names that are imported when first asked for, by module. The registry adds the model classes and, for each
# preset, a function that makes its model: `hsn_tiny(vocab_size=...)`.
_LAZY = {
    "conversion.surgery.bases": ["fit_bases"],
    "conversion.surgery": ["HoloSurgeryConfig", "apply_surgery", "quantize_linears", "restore_linears"],
    "conversion.surgery.transfer": ["transfer_to_hsn"],
    "errors": ["HoloError"],
    "eval.command": ["evaluate"],
    "eval.conformance": ["check_causality"],
    "export.onnx_runtime": ["HoloORTModelForCausalLM"],
    "modeling.backbone": ["RecurrentBackbone"],
    "modeling.binding": ["bind", "unbind"],
    "modeling.cache": ["RecurrentCache"],
    "modeling.configuration_base": ["FamilyConfig"],
    "modeling.harmonics": ["HoloLinear", "SineActivation", "harmonic_basis"],
    "modeling.filters": ["SpectralGate"],
    "modeling.heads": [
        "MaskedLMHead",
        "RecurrentForCausalLM",
        "SequenceClassificationHead",
        "TokenClassificationHead",
    ],
    "modeling.layers": ["GatedChannelMix", "LiteChannelMix"],
    "modeling.memory": ["HolographicMemory", "PersistentMemory"],
    "modeling.modeling_holo": ["HoloAttention", "HoloTransformerBlock"],
    "modeling.modeling_hsn": [
        "HoloSpectralBlock",
        "HoloSpectralNet",
        "HolographicMixer",
        "fft_circular_conv",
        "fft_circular_corr",
    ],
    "modeling.modeling_resonance_multimodal": ["unbinding_fidelity"],
    "modeling.processing_resonance_audio": ["ResonanceFeatureExtractor"],
    "modeling.processing_resonance_multimodal": ["ResonanceProcessor"],
    "modeling.processing_resonance_vision": ["ResonanceImageProcessor"],
    "modeling.phases": ["PhaseDrift", "RotaryEmbedding"],
    "modeling.pretrained": ["FamilyPreTrainedModel"],
    "modeling.scans": ["cancelling_scan", "interference_scan"],
    "modeling.chunks": ["ChunkContext"],
    "modeling.resonators": ["ResonatorBank"],
    "modeling.vocabulary": ["AdaptiveEmbedding", "FrequencyCompressedEmbedding", "HashEmbedding"],
    "peft_defaults": ["offer_adapters"],
    "prefix": ["Prefix"],
    "registry": ["Architecture", "Preset", "get_architecture", "preset_config", "presets"],
    "training.callbacks": ["CausalityCallback"],
    "training.optim": ["MuonAdamW", "WhitenedAdamW"],
}
_ORIGIN = {name: f"{__name__}.{module}" for module, names in _LAZY.items() for name in names}
for _architecture in architectures().values():
    _ORIGIN.update(reversed(path.split(":")) for path in _architecture.models.data.values())
    for _preset in _architecture.presets:
        globals()[_preset.replace("-", "_")] = functools.partial(preset_model, _preset)


def __getattr__(name: str) -> Any:
    if name in INSTEAD:
        return stand_in(name)
    if name not in _ORIGIN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(_ORIGIN[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_ORIGIN})


load_plugins()  # last: plug-ins import this package
