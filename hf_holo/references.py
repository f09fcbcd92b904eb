"""Names of the Resonance reference, `resonance_nn`, each with what to call here instead.

Those of HoloSpectralNet and HOLO-PyTorch work as their READMEs say. The classes of Resonance take vectors where models
of transformers take tokens, pictures or sounds, so that none here has the same arguments: whoever calls one reads in a
line what does the same.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from .errors import HoloError

INSTEAD = {  # what to call, and what to know about it
    "ResonanceNet": (
        "ResonanceModel(ResonanceConfig(hidden_size=256, num_hidden_layers=4, memory_dimension=64))",
        "vectors are its inputs_embeds",
    ),
    "ResonanceEncoder": ("ResonanceModel(ResonanceConfig(causal=False))", ""),
    "ResonanceClassifier": ("ResonanceForSequenceClassification(ResonanceConfig(num_labels=2))", ""),
    "ResonanceAutoencoder": ("ResonanceAudioAutoencoder(ResonanceAudioConfig())", "it is for sounds"),
    "ResonanceLanguageModel": ("ResonanceForCausalLM(ResonanceConfig())", ""),
    "ResonanceCausalLM": ("ResonanceForCausalLM(ResonanceConfig())", ""),
    "ResonanceCodeModel": (
        "ResonanceForMaskedLM(ResonanceConfig(causal=False))",
        "`hf-holo train python-code` trains one",
    ),
    "LongContextResonanceNet": ("ResonanceModel(ResonanceConfig())", "texts may have any length"),
    "StreamingLongContextNet": ("ResonanceModel(ResonanceConfig())", "it continues from its past_key_values"),
    "MultimodalResonanceNet": (
        "ResonanceMultimodalModel(ResonanceMultimodalConfig(text_config={}, vision_config={}))",
        "any two or three of text, vision and audio",
    ),
    "ResonanceVisionNet": ("ResonanceVisionForImageClassification(ResonanceVisionConfig(num_labels=1000))", ""),
    "ResonanceAudioNet": ("ResonanceAudioForAudioClassification(ResonanceAudioConfig(num_labels=50))", ""),
    "ResonanceTimeSeriesNet": (
        "ResonanceModel(ResonanceConfig())",
        "series are its inputs_embeds, and the head is your own",
    ),
    "ResonanceLayer": ("ResonanceModel(ResonanceConfig(num_hidden_layers=1))", "its mixer is a ResonatorBank"),
    "MultiScaleResonanceLayer": (
        "ResonanceModel(ResonanceConfig(num_hidden_layers=1))",
        "its resonators have many time scales",
    ),
    "ResonanceTrainer": ("transformers.Trainer", "`hf-holo train` does all around it"),
    "ComplexityBenchmark": ("evaluate", "`hf-holo eval MODEL --suite speed` measures times and memory over lengths"),
    "HierarchicalVocabularyEmbedding": (
        "ResonanceModel(ResonanceConfig(vocab_size=500_000, embedding_strategy='adaptive'))",
        "",
    ),
}


def stand_in(name: str) -> Callable[..., NoReturn]:
    """What is found under a name of the reference: called, it says what to call instead."""
    return partial(_refuse, name)


def _refuse(name: str, *args: Any, **kwargs: Any) -> NoReturn:
    call, remark = INSTEAD[name]
    raise HoloError(f"{name}: there is no such class here; use {call}{'; ' + remark if remark else ''}")
