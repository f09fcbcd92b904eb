"""Resonance for several senses at once: an encoder for each, and one vector that holds them all by binding.

How the features are fused is in `fusion.py`. Sizes in the shape tags: B batch, M modalities, D `hidden_size`, F width
of the fused vector.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import ModelOutput

from .arguments import check_arguments
from .backbone import wants_dict
from .configuration_resonance_multimodal import ResonanceMultimodalConfig
from .fusion import Fusion, drop_modalities
from .layers import mean_of_real
from .losses import classification_loss, contrastive_loss
from .modeling_resonance import ResonanceModel
from .modeling_resonance_audio import ResonanceAudioModel
from .modeling_resonance_vision import ResonanceVisionModel
from .pretrained import FamilyPreTrainedModel
from .recording import exporting, has_values

ENCODERS: dict[str, Any] = {"text": ResonanceModel, "vision": ResonanceVisionModel, "audio": ResonanceAudioModel}
INPUTS = {  # arguments of `forward`: what an encoder is given, and the mask of what is real in it
    "text": ("input_ids", "attention_mask"),
    "vision": ("pixel_values", "pixel_mask"),
    "audio": ("input_values", "audio_attention_mask"),
}
LARGEST_SCALE = 100.0  # with which cosines are multiplied, as in CLIP
PAIRS = (("vision", "text"), ("audio", "text"), ("vision", "audio"))  # what the contrastive model compares
Inputs = dict[str, tuple[torch.Tensor, torch.Tensor | None]]


@dataclass
class ResonanceMultimodalOutput(ModelOutput):
    """What [`ResonanceMultimodalModel`] returns.

    Args:
        pooler_output: the fused vector `[B, F]`.
        text_features, vision_features, audio_features: what was fused, `[B, D]`; zeros where the modality is missing,
            None where it was not given at all.
        modality_mask: `[B, M]`, which modalities of an example were fused.
    """

    pooler_output: torch.Tensor | None = None
    text_features: torch.Tensor | None = None
    vision_features: torch.Tensor | None = None
    audio_features: torch.Tensor | None = None
    modality_mask: torch.Tensor | None = None


@dataclass
class ResonanceMultimodalContrastiveOutput(ModelOutput):
    """What [`ResonanceMultimodalForContrastive`] returns.

    Args:
        loss: mean over the pairs of modalities that come in equal number.
        logits_per_image, logits_per_text: scaled cosines `[images, texts]` and their transpose, as in CLIP.
        logits_per_audio: `[sounds, texts]`, as in CLAP.
        logits_per_image_audio: `[images, sounds]`.
        text_embeds, image_embeds, audio_embeds: `[rows, projection_dim]`, of length one.
    """

    loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    logits_per_audio: torch.Tensor | None = None
    logits_per_image_audio: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    audio_embeds: torch.Tensor | None = None


class Fidelity(NamedTuple):
    """How well a modality is read back from the fused vector, see [`unbinding_fidelity`]."""

    cosine: float  # mean cosine between what is read and what was bound
    identified: float  # share of the examples whose own features are the nearest to what is read


def along(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`[B]` as `[B, 1, ...]`, with as many dimensions as `x`."""
    return rows[(slice(None), *(None,) * (x.dim() - 1))]


# ---------------------------------------------------------------------------------------------- models
class ResonanceMultimodalPreTrainedModel(FamilyPreTrainedModel):
    config_class = ResonanceMultimodalConfig
    capabilities = frozenset({"bidirectional", "strict_arguments"})
    _no_split_modules = [block for encoder in ENCODERS.values() for block in encoder._no_split_modules]

    def __init__(self, config: ResonanceMultimodalConfig) -> None:
        super().__init__(config)
        self.main_input_name = INPUTS[config.modalities[0]][0]  # by which Trainer counts


class _Encoders(ResonanceMultimodalPreTrainedModel):
    """The encoders, as `text_model`, `vision_model` and `audio_model`, and what is checked before they are called."""

    def __init__(self, config: ResonanceMultimodalConfig) -> None:
        super().__init__(config)
        for name in config.modalities:
            setattr(self, f"{name}_model", ENCODERS[name](getattr(config, f"{name}_config")))

    def get_input_embeddings(self) -> nn.Module:
        """Those of the first modality: of text, if it reads."""
        return self._encoder(self.config.modalities[0]).get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self._encoder(self.config.modalities[0]).set_input_embeddings(value)

    def _encoder(self, name: str) -> Any:
        if name not in self.config.modalities:
            has = ", ".join(self.config.modalities)
            raise ValueError(f"{INPUTS[name][0]}: this model has no {name}_config; it has {has}")
        return getattr(self, f"{name}_model")

    def encode(
        self, name: str, values: torch.Tensor, mask: torch.Tensor | None, present: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What an encoder says of each example, `[B, width]`.

        Args:
            name: the modality.
            values, mask: its inputs, see `INPUTS`.
            present: `[B]`; where it is False there are placeholders, which are replaced by zeros: not even a NaN in
                them reaches the encoder. None: all are present.
        """
        encoder = self._encoder(name)
        if name == "text" and mask is None and encoder.config.pad_token_id is not None:
            mask = (values != encoder.config.pad_token_id).long()
        if present is not None:
            values = values.where(along(present, values), 0)
            mask = None if mask is None else mask.where(along(present, mask), 1)
        if name == "text":
            return mean_of_real(encoder(values, mask, return_dict=True).last_hidden_state, mask)
        if name == "vision":
            return encoder(pixel_values=values, pixel_mask=mask, return_dict=True).pooler_output
        return encoder(input_values=values, attention_mask=mask, use_cache=False, return_dict=True).pooler_output

    def inputs_of(self, **given: torch.Tensor | None) -> Inputs:
        """The inputs of `forward` by modality, those that are given.

        Raises:
            ValueError: none is given, one that the model has no encoder for, or a mask without what it is of.
        """
        inputs: Inputs = {}
        for name, (values_name, mask_name) in INPUTS.items():
            values, mask = given[values_name], given[mask_name]
            if values is not None:
                self._encoder(name)
                inputs[name] = values, mask
            elif mask is not None:
                raise ValueError(f"{mask_name}: give {values_name} too, of which it is the mask")
        if not inputs:
            names = ", ".join(INPUTS[name][0] for name in self.config.modalities)
            raise ValueError(f"no modality at all: give at least one of {names}")
        return inputs

    def presence(self, inputs: Inputs, modality_mask: torch.Tensor | None) -> torch.Tensor:
        """Which modalities the examples have, `[B, M]`, bool.

        Raises:
            ValueError: an example has none, the numbers of examples differ, or `modality_mask` has another shape.
        """
        rows = {INPUTS[name][0]: values.shape[0] for name, (values, _) in inputs.items()}
        if modality_mask is not None:
            rows["modality_mask"] = modality_mask.shape[0]
        values, names = next(iter(inputs.values()))[0], self.config.modalities
        if not exporting() and len(set(rows.values())) > 1:
            sizes = ", ".join(f"{name} has {size}" for name, size in rows.items())
            raise ValueError(f"the numbers of examples differ: {sizes}")
        given = torch.tensor([name in inputs for name in names], device=values.device)
        if modality_mask is None:
            return given.expand(values.shape[0], -1)
        if modality_mask.dim() != 2 or modality_mask.shape[1] != len(names):
            raise ValueError(
                f"modality_mask: shape {tuple(modality_mask.shape)}; give [batch, {len(names)}], with a column for "
                f"each of {', '.join(names)}"
            )
        present = modality_mask.bool() & given
        if has_values(present) and not present.any(1).all():
            empty = (~present.any(1)).nonzero()[:, 0].tolist()
            raise ValueError(f"no modality at all in the rows {empty} of the batch, by modality_mask and what is given")
        return present


class ResonanceMultimodalModel(_Encoders):
    """Resonance for several senses without a head: any of text, images and sounds to one vector for each example."""

    _auto_class = "AutoModel"

    def __init__(self, config: ResonanceMultimodalConfig) -> None:
        super().__init__(config)
        self.fusion = Fusion(config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        audio_attention_mask: torch.Tensor | None = None,
        modality_mask: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ResonanceMultimodalOutput | tuple:
        """
        Args:
            input_ids, attention_mask: `[B, T]`; the mask is 0 at padding. Without it pads are found by the
                `pad_token_id` of the text encoder, if it has one.
            pixel_values: `[B, C, height, width]`.
            pixel_mask: `[B, height, width]`; 1 where a pixel is real.
            input_values, audio_attention_mask: `[B, samples]`; 1 where a sample is real.
            modality_mask: `[B, M]`, in the order of `config.modalities`; False where an example lacks a modality, and
                what is given for it is a placeholder that changes nothing. Default: every example has what is given.
            kwargs: what transformers passes to every model and this one has no use for; see [`check_arguments`].

        A modality that is not given at all is missing for the whole batch. Where one is missing it adds exactly
        nothing: the output is that of a call without it, to the last bit.

        Raises:
            TypeError: an unknown argument.
            ValueError: no modality is given, or one that the model does not have; an example has none; the numbers of
                examples differ; `modality_mask` has another shape.
        """
        check_arguments(self, kwargs)
        inputs = self.inputs_of(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            pixel_mask=pixel_mask,
            input_values=input_values,
            audio_attention_mask=audio_attention_mask,
        )
        given = self.presence(inputs, modality_mask)
        kept = given
        if self.training and self.config.modality_dropout > 0:
            kept = drop_modalities(given, self.config.modality_dropout)
        features = {}
        for index, name in enumerate(self.config.modalities):
            if name in inputs:
                real = None if modality_mask is None else given[:, index]
                pooled = self.encode(name, *inputs[name], real)
                features[name] = self.fusion.features(name, pooled, kept[:, index])
        by_name = {f"{name}_features": x for name, x in features.items()}
        output = ResonanceMultimodalOutput(self.fusion(features), **by_name, modality_mask=kept)
        return output if wants_dict(self.config, return_dict) else output.to_tuple()

    def unbind(self, fused: torch.Tensor, modality: str) -> torch.Tensor:
        """Read one modality back from the fused vector.

        With `fusion="binding"` it is the vector turned back by the phases of the role: the features of that modality
        and, as crosstalk, all else that was bound; how much is left of the features says [`unbinding_fidelity`].
        From a concatenation it is cut out, exactly.

        Args:
            fused: `[..., F]`, the `pooler_output`.
            modality: one of `config.modalities`.

        Returns:
            `[..., D]`, to be compared with the features in the output.

        Raises:
            ValueError: the model does not have this modality, or fuses without roles.
        """
        return self.fusion.unbind(fused, modality)


class ResonanceMultimodalForSequenceClassification(ResonanceMultimodalPreTrainedModel):
    """Class scores of examples that are read, seen and heard, or some of it."""

    _auto_class = "AutoModelForSequenceClassification"

    def __init__(self, config: ResonanceMultimodalConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = ResonanceMultimodalModel(config)
        self.norm = nn.LayerNorm(config.fused_size, eps=config.norm_eps, bias=False)
        self.dense = nn.Linear(config.fused_size, config.hidden_size)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        audio_attention_mask: torch.Tensor | None = None,
        modality_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput | tuple:
        """
        Args:
            labels: `[B]` classes, or `[B]` / `[B, num_labels]` numbers, by `config.problem_type`.
            others: as in [`ResonanceMultimodalModel.forward`], errors too.

        Returns:
            Logits `[B, num_labels]`.

        Raises:
            ValueError: a class that does not exist.
        """
        of_loss = check_arguments(self, kwargs)
        fused = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            pixel_mask=pixel_mask,
            input_values=input_values,
            audio_attention_mask=audio_attention_mask,
            modality_mask=modality_mask,
            return_dict=True,
        ).pooler_output
        hidden = F.gelu(self.dense(self.dropout(self.norm(fused.to(self.norm.weight.dtype)))))
        logits = self.score(self.dropout(hidden))
        loss = None if labels is None else classification_loss(self, logits, labels, **of_loss)
        result = SequenceClassifierOutput(loss, logits)  # type: ignore[arg-type]  # as in heads.py
        return result if wants_dict(self.config, return_dict) else result.to_tuple()


class ResonanceMultimodalForContrastive(_Encoders):
    """Texts, images and sounds in one space, where those that belong together are near (CLIP; Radford et al., 2021)."""

    _auto_class = "AutoModelForZeroShotImageClassification"

    def __init__(self, config: ResonanceMultimodalConfig) -> None:
        super().__init__(config)
        sizes = {name: getattr(config, f"{name}_config").hidden_size for name in config.modalities}
        self.projections = nn.ModuleDict(
            {name: nn.Linear(size, config.projection_dim, bias=False) for name, size in sizes.items()}
        )
        self.logit_scale = nn.Parameter(torch.tensor(float(config.logit_scale_init_value)))
        self.post_init()

    def get_text_features(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """`[texts, T]` to `[texts, projection_dim]`, of any length. ValueError if the model has no text encoder."""
        return self._project("text", input_ids, attention_mask)

    def get_image_features(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None = None) -> torch.Tensor:
        """`[images, C, height, width]` to `[images, projection_dim]`; else as [`get_text_features`]."""
        return self._project("vision", pixel_values, pixel_mask)

    def get_audio_features(
        self, input_values: torch.Tensor, audio_attention_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`[sounds, samples]` to `[sounds, projection_dim]`; else as [`get_text_features`]."""
        return self._project("audio", input_values, audio_attention_mask)

    def _project(
        self, name: str, values: torch.Tensor, mask: torch.Tensor | None, present: torch.Tensor | None = None
    ) -> torch.Tensor:
        pooled = self.encode(name, values, mask, present)
        return self.projections[name](pooled)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        input_values: torch.Tensor | None = None,
        audio_attention_mask: torch.Tensor | None = None,
        modality_mask: torch.Tensor | None = None,
        return_loss: bool = True,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ResonanceMultimodalContrastiveOutput | tuple:
        """
        Args:
            return_loss: whether to compute the loss.
            others: as in [`ResonanceMultimodalModel.forward`]. Without a `modality_mask` the modalities may come in
                different numbers, as in zero-shot classification; a pair of them has a loss where the numbers are
                equal, and row i of one belongs to row i of the other.

        Raises:
            TypeError, ValueError: as there; but for the numbers of examples, which may differ without a mask.
        """
        check_arguments(self, kwargs)
        inputs = self.inputs_of(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            pixel_mask=pixel_mask,
            input_values=input_values,
            audio_attention_mask=audio_attention_mask,
        )
        present: dict[str, torch.Tensor] = {}
        if modality_mask is not None:
            present = dict(zip(self.config.modalities, self.presence(inputs, modality_mask).unbind(1), strict=True))
        embeds = {}
        for name, (values, mask) in inputs.items():
            embed = F.normalize(self._project(name, values, mask, present.get(name)), dim=-1)
            embeds[name] = embed.where(present[name][:, None], 0.0) if present else embed
        logits = self._compare(embeds)
        loss = self._loss(logits, present) if return_loss else None
        per_image = logits.get(("vision", "text"))
        result = ResonanceMultimodalContrastiveOutput(
            loss=loss,
            logits_per_image=per_image,
            logits_per_text=None if per_image is None else per_image.T,
            logits_per_audio=logits.get(("audio", "text")),
            logits_per_image_audio=logits.get(("vision", "audio")),
            text_embeds=embeds.get("text"),
            image_embeds=embeds.get("vision"),
            audio_embeds=embeds.get("audio"),
        )
        return result if wants_dict(self.config, return_dict) else result.to_tuple()

    def _compare(self, embeds: Mapping[str, torch.Tensor]) -> dict[tuple[str, str], torch.Tensor]:
        """Scaled cosines of every pair of modalities that is given, `[N, K]`."""
        scale = self.logit_scale.exp().clamp(max=LARGEST_SCALE)
        given = (pair for pair in PAIRS if embeds.keys() >= set(pair))
        return {(one, other): scale * embeds[one] @ embeds[other].T for one, other in given}

    def _loss(
        self, logits: Mapping[tuple[str, str], torch.Tensor], present: Mapping[str, torch.Tensor]
    ) -> torch.Tensor | None:
        losses = []
        for (one, other), scores in logits.items():
            if scores.shape[0] == scores.shape[1]:
                everywhere = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
                losses.append(contrastive_loss(scores, present[one] & present[other] if present else everywhere))
        return torch.stack(losses).mean() if losses else None


@torch.no_grad()
def unbinding_fidelity(model: ResonanceMultimodalModel, **inputs: torch.Tensor) -> dict[str, Fidelity]:
    """How well each modality is read back from the fused vectors of a batch.

    What else is in the vector is crosstalk. If it is as good as random, the cosine is 1/√(2^M - 1) for M modalities:
    0.58 for two, 0.38 for three. That is far above random cosines, so that an example can still be identified; how
    surely depends on how much the features of the examples differ.

    Args:
        model: a model that fuses by roles, or concatenates.
        inputs: what its `forward` is given.

    Returns:
        For each modality that is given, the mean over the examples that have it.
    """
    output = model(**inputs, return_dict=True)
    measured = {}
    for index, name in enumerate(model.config.modalities):
        features = output.get(f"{name}_features")
        if features is None:
            continue
        rows = output.modality_mask[:, index]
        read = model.unbind(output.pooler_output[rows], name)
        cosines = F.normalize(read, dim=-1) @ F.normalize(features[rows], dim=-1).T
        own = cosines.diagonal()
        measured[name] = Fidelity(own.mean().item(), (cosines.amax(1) <= own).double().mean().item())
    return measured
