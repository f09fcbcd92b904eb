"""The base of all models of this package: initialisation, loading and saving, and the facts that others derive from."""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel

from .cache import CACHE_NAMES
from .checkpoint import check_finite, check_offloaded, naming_the_checkpoint, within_memory
from .embeddings import CompressedEmbedding
from .remote_code import auto_map, card_writers, complete_code, with_code


class FamilyPreTrainedModel(PreTrainedModel):
    """What all models share: initialisation, the facts that others derive from, and transformers' flags.

    A family sets `config_class`, `block_class` and `capabilities` on its subclass. One that keeps a state of constant
    size defines the classmethod `state_spec(config)` as well: for every layer, the name and the shape (without the
    batch) of every state. Allocation, export and the checks are derived from it.
    """

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = list(CACHE_NAMES)  # type: ignore[assignment]  # transformers declares None
    _is_stateful = False  # the cache can take tokens back, so assisted decoding works
    _supports_sdpa = True

    capabilities: frozenset[str] = frozenset()
    block_class: type[nn.Module]
    needs_causal: bool | None = None  # the `causal` of its config; None: it works with both

    def __init__(self, config: PretrainedConfig) -> None:
        if self.needs_causal is not None and config.causal is None:
            config = copy.deepcopy(config)
            config.causal = self.needs_causal
            config.check()
        if self.needs_causal is not None and config.causal != self.needs_causal:
            raise ValueError(
                f"causal: {config.causal}; {type(self).__name__} needs causal={self.needs_causal} in its config"
            )
        super().__init__(config)

    @classmethod
    def can_generate(cls) -> bool:
        return issubclass(cls, GenerationMixin)

    @classmethod
    def capabilities_of(cls, config: PretrainedConfig) -> frozenset[str]:
        """The capabilities that hold for this config; a family overrides it where an option takes one away."""
        return cls.capabilities

    def count_parameters(self, trainable_only: bool = False) -> int:
        """Number of parameters, a tied matrix counted once."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable_only)

    def resize_token_embeddings(  # type: ignore[override]  # transformers gives an nn.Embedding, which not all are
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """As in transformers, for compressed vocabularies too; see [`CompressedEmbedding.resize`]."""
        embedding = self.get_input_embeddings()
        if not isinstance(embedding, CompressedEmbedding):
            return super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        size = embedding.num_embeddings if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            size += -size % pad_to_multiple_of
        if size != embedding.num_embeddings:
            embedding.resize(size, mean_resizing)
            self.config.vocab_size = size
        return embedding

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args,
        use_safetensors: bool | None = None,
        **kwargs,
    ) -> PreTrainedModel | tuple[PreTrainedModel, dict[str, Any]]:
        """As in transformers, with a few differences: pickles are read with `use_safetensors=False` only, errors name
        the checkpoint, and what does not fit into memory or is not finite is refused.

        Raises:
            OSError: there are no weights in the format safetensors, or a file is cut off.
            RuntimeError: weights have other shapes than the config asks for.
            ValueError: weights are NaN or infinite, the config is out of range, it describes more weights than this
                machine has memory for and there is no `device_map`, or a `device_map` leaves on the disk what
                transformers 4.57 does not read from there.
        """
        name, safe = pretrained_model_name_or_path, use_safetensors is not False
        with naming_the_checkpoint(name), within_memory(kwargs.get("device_map") is None):
            loaded = super().from_pretrained(name, *args, use_safetensors=safe, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        check_finite(model, name)
        check_offloaded(model, name)
        return loaded

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """As in transformers, with two things in addition to the weights: the code, so that the folder loads with
        `trust_remote_code=True` where this package is not installed, through the Auto class of every head; and, if the
        folder has no README.md yet, a model card made from the facts."""
        card = Path(save_directory, "README.md")
        self._card_before = card.read_bytes() if card.is_file() else None
        with with_code(type(self)) as possible:
            if possible:
                self.config.auto_map = auto_map(type(self))
            super().save_pretrained(save_directory, is_main_process, *args, **kwargs)
            if possible and is_main_process:
                complete_code(Path(save_directory), (type(self), type(self.config)))
        for write in card_writers if is_main_process and not card.exists() else ():
            write(save_directory)

    def _upload_modified_files(
        self, working_dir: str | os.PathLike, repo_id: str, files_timestamps: dict[str, float], *args, **kwargs
    ) -> Any:
        """Where `push_to_hub` and `save_pretrained(push_to_hub=True)` meet. By now transformers has put a README.md
        next to the weights: the repository's or, if it has none, a form to be filled in. In its place comes what was
        there before, or a card made from the facts."""
        complete_code(Path(working_dir), (type(self), type(self.config)))
        for write in card_writers:
            if not write(working_dir, repo_id, kwargs.get("token"), self._card_before):
                files_timestamps = {**files_timestamps, "README.md": float("inf")}  # stays here
        return super()._upload_modified_files(working_dir, repo_id, files_timestamps, *args, **kwargs)

    def _initialize_weights(self, module: nn.Module, *args) -> None:
        """Without the shortcut of transformers 5 for code of other packages: it passes over every module that has no
        parameters of its own, and with it over those that start the parameters of their children."""
        super()._initialize_weights(module)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.7 * module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            nn.init.ones_(module.weight)
        elif (reset := getattr(module, "reset_parameters", None)) is not None:
            reset()
