"""Attention becomes holographic: the weights of a Llama, Mistral or Phi-3 go to a HoloSpectralNet of the same width.

Everything but the mixing of tokens is kept exactly: embeddings, norms, gated MLPs, the head, and those attention layers
that stay. The new mixers start from the projections of the attention that they replace, and have to be distilled.
"""

import copy
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from ...errors import HoloError
from ...modeling.configuration_hsn import HsnConfig
from ...modeling.modeling_hsn import AttentionMixer, HolographicMixer, HoloSpectralBlock, HsnForCausalLM

SOURCES: dict[str, dict[str, Any]] = json.loads(
    files(__package__).joinpath("transfer_sources.json").read_text(encoding="utf-8")
)

FRESH_SPREAD = 0.7  # standard deviation of a fresh projection, times √fan_in


@torch.no_grad()
def transfer_to_hsn(teacher: PreTrainedModel, layers: list[int] | None = None) -> HsnForCausalLM:
    """Make a HoloSpectralNet out of a transformer; the teacher stays as it is.

    Queries and keys become phases (see [`phases_of`]); values, output projection, MLP, norms, embeddings and head are
    copied. A layer that keeps its attention computes what it computed; with `layers=[]` so does the whole model.

    Args:
        teacher: a causal language model of a family in `transfer_sources.json` (Llama, Mistral, Phi-3); on the meta
            device too.
        layers: which layers get a holographic mixer, negative ones counted from the end; default: all.

    Returns:
        The student, in the dtype and on the device of the teacher, in eval mode.

    Raises:
        HoloError: another family; biases, scaled or partial rotary positions, heads that do not fill the width or
            another activation than SiLU, which the student does not have; no such layer.
    """
    source = source_of(teacher)
    replaced = _resolve(layers, teacher.config.num_hidden_layers)
    config = student_config(teacher, replaced)
    with torch.device(teacher.device):
        student = AutoModelForCausalLM.from_config(config, dtype=teacher.dtype).eval()
    student.generation_config = copy.deepcopy(teacher.generation_config)
    _copy_ends(student, teacher)
    for block, old in zip(student.model.layers, teacher.model.layers, strict=True):
        _copy_block(block, old, source)
    return student


def source_of(teacher: PreTrainedModel) -> dict[str, Any]:
    """Where the teacher's blocks keep their parts.

    Raises:
        HoloError: the family is not in the table.
    """
    family = teacher.config.model_type
    if family not in SOURCES:
        raise HoloError(f"teacher: {family!r} cannot become an hsn; these families can: {', '.join(sorted(SOURCES))}")
    return SOURCES[family]


def student_config(teacher: PreTrainedModel, replaced: set[int]) -> HsnConfig:
    """The config of the student: the shape of the teacher, with holographic mixers in the layers `replaced`."""
    old = teacher.config
    _check_teacher(teacher)
    depth = old.num_hidden_layers
    keeps_attention = len(replaced) < depth
    return HsnConfig(
        vocab_size=old.vocab_size,
        hidden_size=old.hidden_size,
        num_hidden_layers=depth,
        num_heads=old.num_attention_heads,
        num_key_heads=old.num_key_value_heads,
        mixer_types=["holographic" if index in replaced else "attention" for index in range(depth)],
        channel_mix="gated",
        intermediate_size=old.intermediate_size,
        norm_type="rms",
        norm_eps=old.rms_norm_eps,
        rotary_base=_rotary_base(teacher) if keeps_attention else None,
        max_position_embeddings=old.max_position_embeddings,
        initializer_range=old.initializer_range,
        tie_word_embeddings=old.tie_word_embeddings,
        pad_token_id=old.pad_token_id,
        bos_token_id=old.bos_token_id,
        eos_token_id=old.eos_token_id,
    )


def _resolve(layers: list[int] | None, depth: int) -> set[int]:
    if layers is None:
        return set(range(depth))
    for index in layers:
        if not -depth <= index < depth:
            raise HoloError(f"layers: there is no layer {index}; the teacher has {depth}, counted from 0")
    return {index % depth for index in layers}


def _check_teacher(teacher: PreTrainedModel) -> None:
    config = teacher.config
    biased = [name for name, _ in teacher.named_parameters() if name.endswith(".bias")]
    if biased:
        raise HoloError(f"teacher: {biased[0]!r} is a bias, and an hsn has none")
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if width * config.num_attention_heads != config.hidden_size:
        raise HoloError(
            f"teacher: {config.num_attention_heads} heads of {width} do not fill hidden_size={config.hidden_size}"
        )
    if config.hidden_act != "silu":
        raise HoloError(f"teacher: hidden_act={config.hidden_act!r}; the MLP of an hsn has 'silu'")


def _rotary_base(teacher: PreTrainedModel) -> float:
    """The base of the teacher's rotary positions, read from the frequencies themselves."""
    config = teacher.config
    rotary = type(teacher.model.rotary_emb)(config)  # a new one: the teacher's may be on meta
    if getattr(config, "sliding_window", None):
        raise HoloError(f"layers: attention in a window (sliding_window={config.sliding_window}) cannot be kept")
    frequencies = rotary.inv_freq.double()
    pairs = config.hidden_size // config.num_attention_heads // 2
    if len(frequencies) == pairs > 1 and rotary.attention_scaling == 1:
        steps = -torch.arange(pairs, dtype=torch.float64) / pairs
        base = round(float(frequencies[1] ** -pairs), 3)
        if torch.allclose(base**steps, frequencies, rtol=1e-4):
            return base
    raise HoloError("layers: attention with scaled or partial rotary positions cannot be kept; replace all layers")


def _copy_ends(student: HsnForCausalLM, teacher: PreTrainedModel) -> None:
    """Embeddings, last norm and head. The student multiplies embeddings by √D; a tied head makes up for it."""
    scale = student.config.hidden_size**0.5
    new, old = dict(student.named_parameters()), dict(teacher.named_parameters())
    new["model.embed_tokens.weight"].copy_(old["model.embed_tokens.weight"] / scale)
    new["model.norm.weight"].copy_(old["model.norm.weight"])
    if student.config.tie_word_embeddings:
        new["model.norm.weight"].mul_(scale)
    else:
        new["lm_head.weight"].copy_(old["lm_head.weight"])


def _copy_block(block: HoloSpectralBlock, old: nn.Module, source: dict[str, Any]) -> None:
    new = dict(block.named_parameters())
    new["mixer_norm.weight"].copy_(_stacked(old, [source["mixer_norm"]]))
    new["channel_norm.weight"].copy_(_stacked(old, [source["channel_norm"]]))
    new["channel_mix.gate_up_proj.weight"].copy_(_stacked(old, source["gate_up"]))
    new["channel_mix.down_proj.weight"].copy_(_stacked(old, [source["down"]]))
    mixer = block.mixer
    key_width = mixer.key_heads * mixer.head_dim
    query, key, value = _stacked(old, source["qkv"]).split([mixer.heads * mixer.head_dim, key_width, key_width])
    mixer.v_proj.weight.copy_(value)
    mixer.out_proj.weight.copy_(_stacked(old, [source["out"]]))
    if isinstance(mixer, AttentionMixer):
        mixer.q_proj.weight.copy_(query)
        mixer.k_proj.weight.copy_(key)
    else:
        _start_mixer(mixer, query, key)


def _stacked(old: nn.Module, names: list[str]) -> torch.Tensor:
    """The weights of layers that read the same input, one below the other."""
    return torch.cat([old.get_parameter(f"{name}.weight") for name in names])


def phases_of(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Projections to phases that read what queries or keys read.

    A rotary pair (a, b) has the phase atan2(b, a), which no linear projection gives; a + b is the linear one that
    treats both alike. The spread is that of fresh phases, so that interference starts as selective as it does there.

    Args:
        weight: `[H·V, D]` projection to queries or keys, pairs V/2 apart, as Llama has them.

    Returns:
        `[H·V/2, D]`.
    """
    first, second = weight.unflatten(0, (heads, 2, -1)).unbind(1)  # [H, V/2, D]
    phases = (first + second).flatten(0, 1)
    return phases * (FRESH_SPREAD * phases.shape[1] ** -0.5 / phases.std())


def _start_mixer(mixer: HolographicMixer, query: torch.Tensor, key: torch.Tensor) -> None:
    """Filter, decay and gate have no counterpart in attention: they stay as a fresh mixer has them."""
    mixer.q_proj.weight.copy_(phases_of(query, mixer.heads))
    mixer.k_proj.weight.copy_(phases_of(key, mixer.key_heads))


# ---------------------------------------------------------------------------------------------- what became of it
@dataclass(frozen=True)
class Part:
    """A part of the teacher, and what the student has in its place.

    Attributes:
        module: its name in the teacher.
        before, after: kinds of module.
        taken: in words, what the student has of it.
        numbers_before, numbers_after: parameters.
        copied: how many of the student's are the teacher's own.
        derived: how many are made of the teacher's.
    """

    module: str
    before: str
    after: str
    taken: str
    numbers_before: int
    numbers_after: int
    copied: int
    derived: int

    @property
    def fresh(self) -> int:
        return self.numbers_after - self.copied - self.derived


def compare(teacher: PreTrainedModel, student: HsnForCausalLM) -> list[Part]:
    """All parts of the teacher that hold parameters, in their order; a tied head is part of the embeddings.

    Args:
        teacher, student: as given to, and returned by, [`transfer_to_hsn`]; on the meta device too.
    """
    source = source_of(teacher)
    parts = [_part("model.embed_tokens", teacher.model.embed_tokens, student.model.embed_tokens)]
    for index, (old, new) in enumerate(zip(teacher.model.layers, student.model.layers, strict=True)):
        twins = {
            source["mixer_norm"]: new.mixer_norm,
            source["mixer"]: new.mixer,
            source["channel_norm"]: new.channel_norm,
            source["down"].rpartition(".")[0]: new.channel_mix,
        }
        parts += [_part(f"model.layers.{index}.{name}", old.get_submodule(name), twin) for name, twin in twins.items()]
    parts.append(_part("model.norm", teacher.model.norm, student.model.norm))
    if student.lm_head is not None and not student.config.tie_word_embeddings:
        parts.append(_part("lm_head", teacher.lm_head, student.lm_head))
    return parts


def _part(name: str, old: nn.Module, new: nn.Module) -> Part:
    before, after = _numbers(old), _numbers(new)
    taken, copied, derived = "all", after, 0
    if isinstance(new, HolographicMixer):
        taken = "values and output; queries and keys as phases"
        copied, derived = _numbers(new.v_proj, new.out_proj), _numbers(new.q_proj, new.k_proj)
    return Part(name, type(old).__name__, type(new).__name__, taken, before, after, copied, derived)


def _numbers(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
