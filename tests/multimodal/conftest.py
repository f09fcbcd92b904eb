"""Small multimodal models, and inputs that fit them."""

import pytest
import torch
from several_senses import FAMILY, HEADS
from transformers import PreTrainedModel

from hf_holo.data.tokenizers import make_tokenizer
from hf_holo.modeling.processing_resonance_audio import ResonanceFeatureExtractor
from hf_holo.modeling.processing_resonance_multimodal import ResonanceProcessor
from hf_holo.modeling.processing_resonance_vision import ResonanceImageProcessor


@pytest.fixture
def make():
    """Makes a model of a variant in evaluation mode."""

    def make(head: str = "model", variant: str = "plain", **overrides) -> PreTrainedModel:
        torch.manual_seed(0)
        config = FAMILY.config(**{**FAMILY.variants[variant], **overrides})
        return FAMILY.models[HEADS[head]](config).eval()

    return make


@pytest.fixture
def inputs():
    """Makes inputs for the modalities of a model: texts, pictures and sounds of which some are padded."""

    def inputs(model: PreTrainedModel, rows: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
        random = torch.Generator().manual_seed(seed)
        modalities, given = model.config.modalities, {}
        if "text" in modalities:
            given["input_ids"] = torch.randint(1, 61, (rows, 7), generator=random)
            given["attention_mask"] = torch.ones(rows, 7, dtype=torch.long)
            given["attention_mask"][0, 4:] = 0
        if "vision" in modalities:
            given["pixel_values"] = torch.randn(rows, 3, 12, 16, generator=random)
            given["pixel_mask"] = torch.ones(rows, 12, 16, dtype=torch.long)
            given["pixel_mask"][1, :, 8:] = 0
        if "audio" in modalities:
            given["input_values"] = torch.randn(rows, 2000, generator=random)
            given["audio_attention_mask"] = torch.ones(rows, 2000, dtype=torch.long)
            given["audio_attention_mask"][2, 1200:] = 0
        return given

    return inputs


@pytest.fixture(scope="session")
def processor() -> ResonanceProcessor:
    """One with all parts."""
    tokenizer = make_tokenizer("characters", ["an even number below five"])
    return ResonanceProcessor(tokenizer, ResonanceImageProcessor(size=16), ResonanceFeatureExtractor(8000))
