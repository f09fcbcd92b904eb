"""Resonance for pictures: global filters over a grid of patches and interference, without convolution or attention."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput

from .arguments import check_arguments
from .backbone import wants_dict
from .checkpoint import check_memory
from .configuration_resonance_vision import ResonanceVisionConfig
from .feature_maps import BackboneMixin
from .grids import GridFilter
from .layers import init_residual_, mean_of_real
from .losses import classification_loss
from .pretrained import FamilyPreTrainedModel
from .recording import exporting


class GridMerging(nn.Module):
    """Joins squares of `side` × `side` cells into one by a linear map; cells that are missing or masked are zero.

    Args:
        channels: of a cell.
        side: in cells.
        dim: channels of what they become.
        norm_eps: epsilon of the normalisation afterwards.
    """

    def __init__(self, channels: int, side: int, dim: int, norm_eps: float) -> None:
        super().__init__()
        self.side = side
        self.proj = nn.Linear(channels * side * side, dim)
        self.norm = nn.LayerNorm(dim, eps=norm_eps)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`[B, H, W, C]` and a mask `[B, H, W]` of what is real there, None for all, to `[B, H', W', D]` and the mask
        of squares with anything real in them; H' = H / side, rounded up."""
        if mask is not None:
            x = x * mask[..., None]
            mask = self._squares(mask[..., None]).amax((3, 4, 5))
        x = self.norm(self.proj(self._squares(x).flatten(3)))
        return (x if mask is None else x * mask[..., None]), mask

    def _squares(self, x: torch.Tensor) -> torch.Tensor:
        """[B, H, W, C] to [B, H', W', side, side, C], with zeros where a square is not whole."""
        batch, height, width, channels = x.shape
        rows, columns = ((size + self.side - 1) // self.side for size in (height, width))
        x = F.pad(x, (0, 0, 0, columns * self.side - width, 0, rows * self.side - height))
        # not unflatten, after which an exported graph would know the sizes of its example alone
        return x.reshape(batch, rows, self.side, columns, self.side, channels).transpose(2, 3)


class ResonanceVisionBlock(GradientCheckpointingLayer):
    """A filter lets patches meet, interference lets channels meet.

    Two waves come out of a patch: one that has passed the filter, and so brings word of the other patches, and one that
    has not. Each goes through a linear map, the first through SiLU as well, and they are multiplied: what a patch hears
    of the others depends on what it is itself. Without `interference` it is a plain channel mix of what was filtered.

    Args:
        config: a [`ResonanceVisionConfig`].
        stage: index of the stage.
    """

    def __init__(self, config: ResonanceVisionConfig, stage: int) -> None:
        super().__init__()
        dim = config.hidden_sizes[stage]
        inner = max(1, int(dim * config.mlp_ratio))
        self.norm = nn.LayerNorm(dim, eps=config.norm_eps, bias=False)
        self.filter = GridFilter(dim, config.filter_reaches[stage])
        self.filter_norm = nn.LayerNorm(dim, eps=config.norm_eps, bias=False)
        self.gate_proj = nn.Linear(dim, inner)
        self.up_proj = nn.Linear(dim, inner) if config.interference else None
        self.down_proj = nn.Linear(inner, dim)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """`[B, H, W, D]` to `[B, H, W, D]`; `mask` `[B, H, W]`: 1 at real patches, None for all."""
        own = self.norm(x)
        heard = self.filter_norm(self.filter(own if mask is None else own * mask[..., None]))
        heard = self.gate_proj(heard)
        mixed = F.gelu(heard) if self.up_proj is None else F.silu(heard) * self.up_proj(own)
        return x + self.dropout(self.down_proj(mixed))


class ResonanceVisionStage(nn.Module):
    """Blocks over one grid, and before them the merging that makes it; the first stage has its grid from the stem.

    Args:
        config: a [`ResonanceVisionConfig`].
        stage: index of the stage.
    """

    def __init__(self, config: ResonanceVisionConfig, stage: int) -> None:
        super().__init__()
        before, dim = config.hidden_sizes[max(0, stage - 1)], config.hidden_sizes[stage]
        self.merging = GridMerging(before, 2, dim, config.norm_eps) if stage else None
        self.blocks = nn.ModuleList([ResonanceVisionBlock(config, stage) for _ in range(config.depths[stage])])

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`[B, H, W, D]` and its mask to those of the next grid."""
        if self.merging is not None:
            x, mask = self.merging(x, mask)
        for block in self.blocks:
            x = block(x, mask)
        return x, mask


class ResonanceVisionPreTrainedModel(FamilyPreTrainedModel):
    config_class = ResonanceVisionConfig
    main_input_name = "pixel_values"
    block_class = ResonanceVisionBlock
    _no_split_modules = ["ResonanceVisionBlock"]
    capabilities = frozenset({"strict_arguments"})

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ResonanceVisionBlock):
            init_residual_(self.config.num_hidden_layers, module.down_proj)
        if isinstance(module, nn.LayerNorm) and module.bias is not None:
            nn.init.zeros_(module.bias)


class ResonanceVisionEncoder(nn.Module):
    """The stem and the stages: pictures to one grid of features for each.

    Args:
        config: a [`ResonanceVisionConfig`].
    """

    def __init__(self, config: ResonanceVisionConfig) -> None:
        super().__init__()
        self.num_channels, self.patch_size = config.num_channels, config.patch_size
        self.stem = GridMerging(config.num_channels, config.patch_size, config.hidden_sizes[0], config.norm_eps)
        self.stages = nn.ModuleList([ResonanceVisionStage(config, stage) for stage in range(len(config.depths))])

    def forward(
        self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        """`[B, C, H, W]` to the grids `[B, H', W', D]` of the stem and of each stage, and to their masks."""
        self.check(pixel_values, pixel_mask)
        dtype = self.stem.proj.weight.dtype
        mask = None if pixel_mask is None else pixel_mask.to(dtype)
        x, mask = self.stem(pixel_values.permute(0, 2, 3, 1).to(dtype), mask)
        grids, masks = [x], [mask]
        for stage in self.stages:
            x, mask = stage(x, mask)
            grids.append(x)
            masks.append(mask)
        return grids, masks

    def check(self, pixel_values: torch.Tensor | None, pixel_mask: torch.Tensor | None) -> None:
        """Raise ValueError where these are no pictures, or not what the model was made for."""
        if pixel_values is None:
            raise ValueError("pixel_values: None; give pictures [batch, channels, height, width]")
        shape = tuple(pixel_values.shape)
        if pixel_values.dim() != 4 or (not exporting() and shape[1] != self.num_channels):
            raise ValueError(f"pixel_values: shape {shape}; give [batch, {self.num_channels} channels, height, width]")
        if not pixel_values.is_floating_point():
            raise ValueError(f"pixel_values: {pixel_values.dtype}; give floats, as the image processor makes them")
        if exporting():
            return
        if not shape[0]:
            raise ValueError(f"pixel_values: shape {shape}, the batch is empty; give at least one picture")
        if min(shape[2:]) < self.patch_size:
            raise ValueError(f"pixel_values: shape {shape}, smaller than one patch of {self.patch_size} pixels")
        wanted = (shape[0], *shape[2:])
        if pixel_mask is not None and tuple(pixel_mask.shape) != wanted:
            raise ValueError(f"pixel_mask: shape {tuple(pixel_mask.shape)}; give {wanted}, 1 at real pixels")


class ResonanceVisionModel(ResonanceVisionPreTrainedModel):
    """Resonance for pictures without a head: `[B, C, H, W]` to features of every patch and of the whole picture."""

    _auto_class = "AutoModel"

    def __init__(self, config: ResonanceVisionConfig) -> None:
        super().__init__(config)
        check_memory(lambda: ResonanceVisionEncoder(config))
        self.encoder = ResonanceVisionEncoder(config)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.stem.proj  # whose output is a tensor, as transformers 5 expects

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple:
        """
        Args:
            pixel_values: `[B, C, H, W]`, any height and width from one patch on.
            pixel_mask: `[B, H, W]`, 1 at real pixels and 0 at padding; default: all are real. Padding changes nothing.
            output_hidden_states: whether to return the grids of the stem and of each stage, `[B, D, H', W']`.
            kwargs: what transformers passes to every model and this one has no use for; see [`check_arguments`].

        Returns:
            `last_hidden_state` `[B, patches, D]`, row by row, zeros at patches of padding, and `pooler_output`
            `[B, D]`, the mean over the real patches.

        Raises:
            TypeError: an unknown argument.
            ValueError: pictures or masks of another shape, other channels, no pictures, or smaller than a patch.
        """
        check_arguments(self, kwargs)
        grids, masks = self.encoder(pixel_values, pixel_mask)
        hidden = self.norm(grids[-1]).flatten(1, 2)  # [B, patches, D]
        real = None if masks[-1] is None else masks[-1].flatten(1)
        pooled = mean_of_real(hidden, real)
        if real is not None:
            hidden = hidden * real[..., None]
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        maps = tuple(grid.permute(0, 3, 1, 2) for grid in grids) if output_hidden_states else None
        output = BaseModelOutputWithPooling(hidden, pooled, maps)  # type: ignore[arg-type]
        return output if wants_dict(self.config, return_dict) else output.to_tuple()


class ResonanceVisionForImageClassification(ResonanceVisionPreTrainedModel):
    """Class scores of whole pictures, from the mean over their patches."""

    _auto_class = "AutoModelForImageClassification"

    def __init__(self, config: ResonanceVisionConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = ResonanceVisionModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> ImageClassifierOutput | tuple:
        """Logits `[B, num_labels]`; `labels` `[B]` classes, or `[B]` / `[B, num_labels]` numbers, by
        `config.problem_type`. Others and errors as in [`ResonanceVisionModel.forward`]; ValueError for a class that
        does not exist."""
        of_loss = check_arguments(self, kwargs)
        output = self.model(pixel_values, pixel_mask, output_hidden_states=output_hidden_states, return_dict=True)
        logits = self.classifier(self.dropout(output.pooler_output))
        loss = None if labels is None else classification_loss(self, logits, labels, **of_loss)
        result = ImageClassifierOutput(loss, logits, output.hidden_states)  # type: ignore[arg-type]  # as in heads.py
        return result if wants_dict(self.config, return_dict) else result.to_tuple()


class ResonanceVisionBackbone(BackboneMixin, ResonanceVisionPreTrainedModel):
    """Feature maps at several scales for detection, segmentation and other dense tasks."""

    _auto_class = "AutoBackbone"
    has_attentions = False

    def __init__(self, config: ResonanceVisionConfig) -> None:
        super().__init__(config)
        begin: Any = getattr(self, "_init_backbone", None)  # of transformers 4.57; 5 has done it by now
        if begin is not None:
            begin(config)
        self.num_features: list[int] = [config.hidden_sizes[0], *config.hidden_sizes]
        self.encoder = ResonanceVisionEncoder(config)
        chosen: Any = self.out_features
        sizes = dict(zip(config.stage_names, self.num_features, strict=True))
        self.norms = nn.ModuleDict({name: nn.LayerNorm(sizes[name], eps=config.norm_eps) for name in chosen})
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.stem.proj  # whose output is a tensor, as transformers 5 expects

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        pixel_mask: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BackboneOutput | tuple:
        """`feature_maps`: those of `config.out_features`, `[B, D, H', W']` each, normalised, zeros at patches of
        padding. Arguments and errors as in [`ResonanceVisionModel.forward`]."""
        check_arguments(self, kwargs)
        grids, masks = self.encoder(pixel_values, pixel_mask)
        chosen: Any = self.out_features
        maps = []
        for name, grid, mask in zip(self.config.stage_names, grids, masks, strict=True):
            if name in chosen:
                grid = self.norms[name](grid)
                maps.append((grid if mask is None else grid * mask[..., None]).permute(0, 3, 1, 2))
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        kept = tuple(grid.permute(0, 3, 1, 2) for grid in grids) if output_hidden_states else None
        output = BackboneOutput(tuple(maps), kept)
        return output if wants_dict(self.config, return_dict) else output.to_tuple()
