"""The multimodal family, and which inputs belong to which modality."""

import torch

from hf_holo import get_architecture

FAMILY = get_architecture("resonance_multimodal")
HEADS = {
    "model": "AutoModel",
    "classifier": "AutoModelForSequenceClassification",
    "contrastive": "AutoModelForZeroShotImageClassification",
}
OWN = {  # the inputs of each modality
    "text": ("input_ids", "attention_mask"),
    "vision": ("pixel_values", "pixel_mask"),
    "audio": ("input_values", "audio_attention_mask"),
}


def only(given: dict[str, torch.Tensor], *modalities: str) -> dict[str, torch.Tensor]:
    """Those of the inputs that belong to these modalities."""
    names = [name for modality in modalities for name in OWN[modality]]
    return {name: given[name] for name in names if name in given}
