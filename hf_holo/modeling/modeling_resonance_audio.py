"""Resonance for sound: from the waveform to classes, of whole recordings or of every moment, through resonators.

A waveform becomes log-mel frames inside the model, a few frames become one step, and blocks of Resonance run over the
steps. Sizes in the shape tags: B batch, S samples, T steps, K frames of a step, M mel bands, D channels.

A causal model hears a recording in pieces of any length, with the same result as at once: its cache keeps the samples
of the step that is not finished, next to the states of the blocks.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPoolingAndCrossAttentions,
    SequenceClassifierOutputWithPast,
    TokenClassifierOutput,
)
from transformers.utils import ModelOutput

from .arguments import check_arguments
from .backbone import RecurrentStack, wants_dict
from .cache import CACHE_NAME, RecurrentCache, RecurrentLayer, given_cache
from .chunks import FadingSum
from .configuration_resonance_audio import ResonanceAudioConfig
from .layers import at_least_float32, make_norm
from .layout import TokenLayout
from .losses import CLASSES, check_labels, classification_loss, token_classification_loss
from .modeling_resonance import ResonanceBlock, ResonancePreTrainedModel
from .recording import exporting, has_values
from .spectrogram import log_mel

LEAST_VARIANCE = 1.0  # of log-mel values, added to what is measured: silence stays 0, and a sudden sound is no shock


# ----------------------------------------------------------------------------------------------- waveform to steps
class Normalization(nn.Module):
    """Log-mel steps to mean 0 and variance 1, by the mean and the variance of all bands together: a change of volume
    changes nothing, the shape of the spectrum stays.

    Args:
        kind: `"recording"`: over all real steps; `"running"`: over the steps so far, older ones fading; `"none"`.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.past = FadingSum(3) if kind == "running" else None

    def state_spec(self) -> dict[str, tuple[int, ...]]:
        return {} if self.past is None else self.past.state_spec("level")

    def forward(self, x: torch.Tensor, layout: TokenLayout, cache: RecurrentLayer | None = None) -> torch.Tensor:
        """`[B, T, K·M]` to the same; continues from `cache` and updates it, if given."""
        if self.kind == "none":
            return x
        moments = torch.stack([x.mean(-1), x.square().mean(-1), torch.ones_like(x[..., 0])], -1)  # [B, T, 3]
        moments = layout.mask(moments)
        if self.past is None:
            totals = moments.sum(1, keepdim=True)
        else:
            before = None if cache is None else cache.get("level")
            totals, after = self.past(moments, before, layout.lengths)
            if cache is not None:
                cache.put("level", after, layout.length, cannot_take_back)
        mean, square = (totals[..., :2] / totals[..., 2:].clamp_min(1)).split(1, -1)  # [B, T or 1, 1]
        return (x - mean) * ((square - mean.square()).clamp_min(0) + LEAST_VARIANCE).rsqrt()


class FrontEnd(nn.Module):
    """Waveforms to normalised log-mel steps, whole or piece by piece.

    Frame f of a causal model ends where hop f of the recording does; that of a bidirectional one is centred on its hop.
    A step is there as soon as all its samples are; what is left of a recording at its end is not heard. Without a
    cache, a recording of less than one step is filled up with silence.

    Args:
        config: a [`ResonanceAudioConfig`].
    """

    def __init__(self, config: ResonanceAudioConfig) -> None:
        super().__init__()
        self.config = config
        self.normalization = Normalization(config.normalization)

    def state_spec(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the states, without the batch: the last samples, and how many of them no step has yet."""
        kept = self.config.history + self.config.samples_per_step - 1
        return {"samples": (kept,), "pending": (1,)} | self.normalization.state_spec()

    def forward(
        self, samples: torch.Tensor, mask: torch.Tensor | None = None, cache: RecurrentLayer | None = None
    ) -> tuple[torch.Tensor, TokenLayout]:
        """Samples `[B, S]` and 1 where they are real `[B, S]` (None: everywhere) to steps `[B, T, K·M]` and where those
        are real."""
        config, lengths = self.config, None
        if mask is not None and (exporting() or not bool(mask.all())):
            samples, lengths = samples * mask.to(samples.dtype), mask.long().sum(1)  # [B]
        if cache is None:
            stream, steps, lengths = self._whole(samples, lengths)
        else:
            stream, steps, lengths = self._continue(samples, lengths, cache)
            if not exporting() and not steps:
                return stream.new_zeros(len(samples), 0, config.frames_per_step * config.num_mel_bins), TokenLayout(0)
        frames = log_mel(
            stream,
            config.frame_length,
            config.hop_length,
            config.sampling_rate,
            config.num_mel_bins,
            config.mel_lowest,
            config.mel_highest,
        )
        return self.steps(frames[:, : steps * config.frames_per_step], lengths, cache)

    def steps(
        self, frames: torch.Tensor, lengths: torch.Tensor | None, cache: RecurrentLayer | None = None
    ) -> tuple[torch.Tensor, TokenLayout]:
        """Log-mel frames `[B, T·K, M]` and the number of real steps `[B]` to what [`forward`] returns."""
        x = frames.unflatten(1, (-1, self.config.frames_per_step)).flatten(2)
        layout = TokenLayout(x.shape[1])
        if lengths is not None:
            layout.lengths, layout.valid = lengths, torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        return self.normalization(x, layout, cache), layout

    def _whole(
        self, samples: torch.Tensor, lengths: torch.Tensor | None
    ) -> tuple[torch.Tensor, Any, torch.Tensor | None]:
        """Samples of whole recordings and their numbers [B] to what [`_continue`] returns."""
        step, history = self.config.samples_per_step, self.config.history
        if not exporting() and samples.shape[1] < step:
            samples = F.pad(samples, (0, step - samples.shape[1]))
        if lengths is not None:
            lengths = (lengths // step).clamp_min(1) * (lengths > 0)
        left = history if self.config.causal else history // 2
        return F.pad(samples, (left, history - left)), samples.shape[1] // step, lengths

    def _continue(
        self, samples: torch.Tensor, lengths: torch.Tensor | None, cache: RecurrentLayer
    ) -> tuple[torch.Tensor, Any, torch.Tensor | None]:
        """The samples `[B, T·step + history]` of the steps that end in this piece; their number, and that of each row
        `[B]`, None if all have as many."""
        step, (kept,) = self.config.samples_per_step, self.state_spec()["samples"]
        before, pending = cache.get("samples"), cache.get("pending")
        if before is None or pending is None:
            before, pending = samples.new_zeros(len(samples), kept), samples.new_zeros(len(samples), 1)
        joined = torch.cat([before.to(samples.dtype), samples], 1)  # [B, kept + S]
        new = torch.full_like(pending[:, 0], samples.shape[1]).long() if lengths is None else lengths
        waiting = pending[:, 0].long()
        # 1. what the next piece continues from: the last samples, and how many of them belong to an unfinished step
        last = new[:, None] + torch.arange(kept, device=samples.device)
        cache.put("samples", joined.gather(1, last), samples.shape[1], cannot_take_back)
        unfinished = ((waiting + new) % step)[:, None].to(pending.dtype)
        cache.put("pending", unfinished, samples.shape[1], cannot_take_back)
        # 2. the steps that are complete, from where the first unfinished one began
        counts = (waiting + new) // step  # [B]
        steps = (samples.shape[1] + step - 1) // step if exporting() else int(counts.max())
        first = step - 1 - waiting[:, None]  # [B, 1]
        at = first + torch.arange(steps * step + self.config.history, device=samples.device)
        stream = joined.gather(1, at.clamp(max=joined.shape[1] - 1))
        same = not exporting() and bool((counts == steps).all())
        return stream, steps, None if same else counts


def cannot_take_back(tokens: int) -> torch.Tensor:
    raise ValueError("crop: sound cannot be taken back; keep a copy of the cache from before it was heard")


def hide_parts(x: torch.Tensor, config: ResonanceAudioConfig) -> torch.Tensor:
    """Zeros, which is the mean, in random stretches of the steps and random bands of `[B, T, K·M]`: in training."""
    if config.mask_time_prob:
        x = x * ~_stretches(x.shape[:2], config.mask_time_prob, config.mask_time_length, x.device)[..., None]
    if config.mask_feature_prob:
        shape = (len(x), config.num_mel_bins)
        hidden = _stretches(shape, config.mask_feature_prob, config.mask_feature_length, x.device)
        x = x * ~hidden.repeat(1, config.frames_per_step)[:, None]
    return x


def _stretches(shape: tuple[int, ...], share: float, length: int, device: torch.device) -> torch.Tensor:
    """True in stretches of `length` that begin anywhere along the second dimension; `share` of it, where none meet."""
    starts = (torch.rand(shape, device=device) < share / length).float()
    return F.max_pool1d(F.pad(starts, (length - 1, 0))[:, None], length, stride=1)[:, 0] > 0


# ---------------------------------------------------------------------------------------------------------- models
class ResonanceAudioPreTrainedModel(ResonancePreTrainedModel):
    config_class = ResonanceAudioConfig  # type: ignore[assignment]  # both are configs of ResonanceBlock
    config: ResonanceAudioConfig
    main_input_name = "input_values"
    input_modalities = "audio"
    _is_stateful = True  # nothing can be taken back from its cache
    capabilities = frozenset({"causal", "bidirectional", "constant_state", "strict_arguments"})

    @classmethod
    def state_spec(cls, config: ResonanceAudioConfig) -> list[dict[str, tuple[int, ...]]]:  # type: ignore[override]
        first, *others = super().state_spec(config)
        return [first | FrontEnd(config).state_spec() | {"heard": (config.hidden_size + 1,)}, *others]


class ResonanceAudioModel(ResonanceAudioPreTrainedModel, RecurrentStack):
    """Resonance for sound without a head: waveforms `[B, S]` to hidden states `[B, T, hidden_size]`."""

    _auto_class = "AutoModel"

    def __init__(self, config: ResonanceAudioConfig) -> None:
        super().__init__(config)
        self.front_end = FrontEnd(config)
        self.embed_steps = nn.Linear(config.frames_per_step * config.num_mel_bins, config.hidden_size)
        self.layers = self.make_blocks(config)
        self.norm = make_norm(config)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_steps

    def forward(
        self,
        input_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions | tuple:
        """
        Args:
            input_values: `[B, S]`, samples of one channel between -1 and 1 at the sampling rate of the config.
            attention_mask: `[B, S]`, 1 at samples and 0 at the padding after them. Default: no padding.
            past_key_values, cache: what a causal model continues from, updated in place; two names of one argument.
            kwargs: what transformers passes to every model and this one has no use for; see [`check_arguments`].

        Returns:
            `last_hidden_state` `[B, T, D]`, one row for every `samples_per_step` samples of the longest recording, and
            `pooler_output` `[B, D]`, the mean over the real steps, with a cache over all that it has heard.

        Raises:
            TypeError: an unknown argument.
            ValueError: samples or mask of another shape or kind, no samples, padding before samples, or a cache of
                another kind or with gradient checkpointing.
        """
        check_arguments(self, kwargs)
        samples = self._samples(input_values, attention_mask)
        # check_cache refuses all others
        state: RecurrentCache | None = self._cache(given_cache(past_key_values, cache), use_cache, len(samples))  # type: ignore[assignment]
        first = None if state is None else state.layers[0]
        with torch.autocast(samples.device.type, enabled=False):
            features, layout = self.front_end(samples, attention_mask, first)
        if state is not None:
            state.advance(layout.length)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        hidden_states = self.encode(features, layout, state, output_hidden_states)
        output = BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden_states[-1],  # type: ignore[arg-type]  # it asks for a FloatTensor
            pooler_output=self._pool(hidden_states[-1], layout, first),  # type: ignore[arg-type]
            hidden_states=tuple(hidden_states) if output_hidden_states else None,  # type: ignore[arg-type]
            **{CACHE_NAME: state},  # type: ignore[arg-type]
        )
        return output if wants_dict(self.config, return_dict) else output.to_tuple()

    def encode(
        self, features: torch.Tensor, layout: TokenLayout, cache: RecurrentCache | None = None, keep_all: bool = False
    ) -> list[torch.Tensor]:
        """Steps `[B, T, K·M]` to the hidden states after the last norm `[B, T, D]`; with `keep_all`, first those that
        enter each block. In training, parts of the steps are hidden."""
        if self.training:
            features = hide_parts(features, self.config)
        x = self.embed_steps(features.to(self.embed_steps.weight.dtype))
        if not layout.length and not exporting():
            return [x] * (self.config.num_hidden_layers * keep_all) + [self.norm(x)]
        return self.run_blocks(x, cache, keep_all, layout=layout)

    def _samples(self, input_values: torch.Tensor | None, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """The waveforms, checked, in the precision of the spectra."""
        if input_values is None or input_values.dim() != 2 or not input_values.is_floating_point():
            given = None if input_values is None else f"{input_values.dtype} of shape {tuple(input_values.shape)}"
            raise ValueError(
                f"input_values: {given}; give [batch, samples] of one channel, as floating-point numbers between -1 "
                "and 1, as ResonanceFeatureExtractor makes them"
            )
        if not exporting() and 0 in input_values.shape:
            raise ValueError(f"input_values: nothing, of shape {tuple(input_values.shape)}; give at least one sample")
        if attention_mask is not None and not exporting():
            if attention_mask.shape != input_values.shape:
                raise ValueError(
                    f"attention_mask: shape {tuple(attention_mask.shape)} does not fit the samples "
                    f"{tuple(input_values.shape)}; give one value for each, 1 where it is real and 0 at padding"
                )
            if has_values(attention_mask) and bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
                raise ValueError("attention_mask: padding must come after the samples; pad on the right")
        wanted = torch.promote_types(input_values.dtype, self.embed_steps.weight.dtype)
        return input_values.to(at_least_float32(wanted))

    def _pool(self, hidden: torch.Tensor, layout: TokenLayout, cache: RecurrentLayer | None) -> torch.Tensor:
        """The mean over the real steps, `[B, T, D]` to `[B, D]`, and over those before that the cache has counted."""
        exact = layout.mask(hidden).to(at_least_float32(hidden.dtype))
        counts = exact.new_full((len(hidden),), layout.length) if layout.lengths is None else layout.lengths.to(exact)
        heard = torch.cat([exact.sum(1), counts[:, None]], 1)  # [B, D + 1]
        if cache is not None:
            before = cache.get("heard")
            heard = heard if before is None else heard + before
            cache.put("heard", heard, layout.length, cannot_take_back)
        return (heard[:, :-1] / heard[:, -1:].clamp_min(1)).to(hidden.dtype)


class _AudioHead(ResonanceAudioPreTrainedModel):
    """[`ResonanceAudioModel`] as `self.model`, and a linear layer that gives class scores."""

    def __init__(self, config: ResonanceAudioConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = ResonanceAudioModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.score = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_steps


class ResonanceAudioForAudioClassification(_AudioHead):
    """Class scores of whole recordings; of a causal model, at every moment of all that it has heard."""

    _auto_class = "AutoModelForAudioClassification"

    def __init__(self, config: ResonanceAudioConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForSequenceClassification"

    def forward(
        self,
        input_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutputWithPast | tuple:
        """Logits `[B, num_labels]`; `labels` `[B]` classes, or `[B]` / `[B, num_labels]` numbers, by
        `config.problem_type`. The rest as in [`ResonanceAudioModel.forward`], errors too; ValueError for a class that
        does not exist."""
        of_loss = check_arguments(self, kwargs)
        output = self.model(
            input_values,
            attention_mask,
            given_cache(past_key_values, cache),
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.score(self.dropout(output.pooler_output))
        loss = None if labels is None else classification_loss(self, logits, labels, **of_loss)
        cache = output.get(CACHE_NAME)
        result = SequenceClassifierOutputWithPast(loss, logits, cache, output.hidden_states)  # type: ignore[arg-type]
        return result if wants_dict(self.config, return_dict) else result.to_tuple()


class ResonanceAudioForAudioFrameClassification(_AudioHead):
    """Class scores of every step."""

    _auto_class = "AutoModelForAudioFrameClassification"

    def __init__(self, config: ResonanceAudioConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForTokenClassification"

    def forward(
        self,
        input_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> TokenClassifierOutput | tuple:
        """Logits `[B, T, num_labels]`; `labels` `[B, T]`, -100 where no loss is wanted, ValueError for others. The rest
        as in [`ResonanceAudioModel.forward`], errors too. A cache is updated in place and not returned: make one by
        `RecurrentCache(config)`."""
        of_loss = check_arguments(self, kwargs)
        if labels is not None:
            check_labels(labels, self.num_labels, CLASSES)
        output = self.model(
            input_values,
            attention_mask,
            given_cache(past_key_values, cache),
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.score(self.dropout(output.last_hidden_state))
        loss = None if labels is None else token_classification_loss(self, logits, labels, **of_loss)
        result = TokenClassifierOutput(loss, logits, output.hidden_states)  # type: ignore[arg-type]
        return result if wants_dict(self.config, return_dict) else result.to_tuple()


@dataclass
class ResonanceAudioAutoencoderOutput(ModelOutput):
    """
    Args:
        loss: mean squared error of the reconstruction over the real frames; 1 is what the mean of a loud recording has.
        reconstruction: normalised log-mel frames `[B, T·K, M]`.
        latents: `[B, T, latent_size]`.
        target: what was to be reconstructed, `[B, T·K, M]`.
        mask: `[B, T·K]`, True at real frames; None where all are.
    """

    loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    target: torch.Tensor | None = None
    mask: torch.Tensor | None = None


class ResonanceAudioAutoencoder(ResonanceAudioPreTrainedModel):
    """Sound through a bottleneck: blocks, `latent_size` values of every step, and blocks that make log-mel frames of
    them. With masks in the config, it learns to fill in what was hidden."""

    _auto_class = "AutoModelForPreTraining"

    def __init__(self, config: ResonanceAudioConfig) -> None:
        super().__init__(config)
        self.model = ResonanceAudioModel(config)
        self.to_latent = nn.Linear(config.hidden_size, config.latent_size)
        self.from_latent = nn.Linear(config.latent_size, config.hidden_size)
        self.decoder = nn.ModuleList([ResonanceBlock(config, index) for index in range(config.num_decoder_layers)])
        self.decoder_norm = make_norm(config)
        self.to_frames = nn.Linear(config.hidden_size, config.frames_per_step * config.num_mel_bins)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_steps

    def forward(
        self,
        input_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ResonanceAudioAutoencoderOutput | tuple:
        """
        Args:
            input_values: waveforms `[B, S]` as in [`ResonanceAudioModel.forward`]; or
            input_features: log-mel frames `[B, F, M]`, as [`log_mel`] makes them.
            attention_mask: `[B, S]` or `[B, F]`, 1 where they are real and 0 at the padding after them.

        Raises:
            ValueError: as in [`ResonanceAudioModel.forward`]; neither or both of the inputs.
        """
        check_arguments(self, kwargs)
        if (input_values is None) == (input_features is None):
            raise ValueError("input_values, input_features: give exactly one of them")
        target, layout = self._steps(input_values, input_features, attention_mask)
        latents = self.to_latent(self.model.encode(target, layout)[-1])
        frames = self.decode(latents, layout)
        values = self.config.num_mel_bins
        error = (frames.to(target.dtype) - target.detach()).square().mean(-1)  # [B, T]
        real = torch.ones_like(error) if layout.valid is None else layout.valid.to(error.dtype)
        mask = None if layout.valid is None else layout.valid.repeat_interleave(self.config.frames_per_step, 1)
        result = ResonanceAudioAutoencoderOutput(
            loss=(error * real).sum() / real.sum().clamp_min(1),
            reconstruction=frames.unflatten(-1, (-1, values)).flatten(1, 2),
            latents=latents,
            target=target.unflatten(-1, (-1, values)).flatten(1, 2),
            mask=mask,
        )
        return result if wants_dict(self.config, return_dict) else result.to_tuple()

    def decode(self, latents: torch.Tensor, layout: TokenLayout | None = None) -> torch.Tensor:
        """Latents `[B, T, latent_size]` to steps of normalised log-mel frames `[B, T, K·M]`."""
        layout = TokenLayout(latents.shape[1]) if layout is None else layout
        x = self.from_latent(latents)
        for block in self.decoder:
            x = block(x, layout)
        return self.to_frames(self.decoder_norm(x))

    def _steps(
        self, waveforms: torch.Tensor | None, frames: torch.Tensor | None, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, TokenLayout]:
        """What the front end makes of either input."""
        if waveforms is not None:
            return self.model.front_end(self.model._samples(waveforms, mask), mask)
        assert frames is not None
        per_step = self.config.frames_per_step
        if frames.dim() != 3 or frames.shape[2] != self.config.num_mel_bins or frames.shape[1] < per_step:
            raise ValueError(
                f"input_features: shape {tuple(frames.shape)}; give [batch, frames, {self.config.num_mel_bins}], at "
                f"least {per_step} frames"
            )
        lengths = None if mask is None else mask.long().sum(1) // per_step
        steps = frames.shape[1] // per_step
        return self.model.front_end.steps(frames[:, : steps * per_step].to(at_least_float32(frames.dtype)), lengths)
