"""What transformers asks of backbones that give feature maps, from where each of its versions has it."""

try:
    from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin  # transformers 5
except ImportError:
    from transformers.utils.backbone_utils import BackboneConfigMixin, BackboneMixin  # transformers 4.57

__all__ = ["BackboneConfigMixin", "BackboneMixin", "choose_maps"]


def choose_maps(config: BackboneConfigMixin, out_features: list[str] | None, out_indices: list[int] | None) -> None:
    """Set which of `config.stage_names` a backbone gives, by name or by index; None and None: the last.

    Raises:
        ValueError: an unknown stage, one twice, stages not in order, or names that are not those of the indices.
    """
    config._out_features = config._out_indices = None
    if out_features is None:
        config.out_indices = out_indices
        return
    config.out_features = list(out_features)
    if out_indices is not None and list(config.out_indices) != list(out_indices):
        raise ValueError(
            f"out_indices: {out_indices} and out_features={out_features} name different stages; give one of them"
        )
