"""Small models for sound and sounds to try them on."""

import json

import torch

from hf_holo.eval.conformance.subject import perturb
from hf_holo.modeling.configuration_resonance_audio import ResonanceAudioConfig
from hf_holo.modeling.modeling_resonance_audio import ResonanceAudioModel
from hf_holo.registry import VARIANTS as FOLDER

FIRST, *OTHERS = json.loads((FOLDER / "resonance_audio.json").read_text(encoding="utf-8")).items()
VARIANTS = {name: FIRST[1] | changes for name, changes in [FIRST, *OTHERS]}
CAUSAL = [name for name, arguments in VARIANTS.items() if arguments.get("causal")]
EXACT = {"rtol": 1e-8, "atol": 1e-8}


def make(model_class=ResonanceAudioModel, variant="plain", seed=0, **overrides):
    """A float64 model whose weights are moved away from their initial values: no claim may rest on them."""
    torch.manual_seed(seed)
    return perturb(model_class(ResonanceAudioConfig(**{**VARIANTS[variant], **overrides}))).double().eval()


def tones(rows, samples, seed=0):
    """`[rows, samples]` of gliding tones with noise, at most 1."""
    generator = torch.Generator().manual_seed(seed)
    pitch = 0.02 + 0.5 * torch.rand(rows, 1, generator=generator, dtype=torch.float64)
    time = torch.arange(samples, dtype=torch.float64)
    noise = torch.randn(rows, samples, generator=generator, dtype=torch.float64)
    return 0.5 * torch.sin(pitch * time * (1 + time / samples)) + 0.05 * noise


def padded(recordings):
    """Recordings of several lengths as a batch and its mask, with noise where nothing is real."""
    longest = max(len(recording) for recording in recordings)
    batch = 9.0 * torch.randn(len(recordings), longest, dtype=torch.float64)
    mask = torch.zeros(len(recordings), longest, dtype=torch.long)
    for row, recording in enumerate(recordings):
        batch[row, : len(recording)] = recording
        mask[row, : len(recording)] = 1
    return batch, mask
