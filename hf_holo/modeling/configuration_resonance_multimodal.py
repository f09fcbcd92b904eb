"""Config of Resonance for several senses at once."""

import copy
from typing import Any

from transformers import PretrainedConfig

from .configuration_base import WIDEST
from .configuration_resonance import ResonanceConfig
from .configuration_resonance_audio import ResonanceAudioConfig
from .configuration_resonance_vision import ResonanceVisionConfig
from .validation import check_choice, check_divides, check_positive, check_probability

# The modalities in the order in which everything names them, and the config of the encoder of each.
ENCODER_CONFIGS: dict[str, type[PretrainedConfig]] = {
    "text": ResonanceConfig,
    "vision": ResonanceVisionConfig,
    "audio": ResonanceAudioConfig,
}
FUSIONS = ("binding", "superposition", "concatenation")
OTHER_CONFIGS = ("quantization_config",)  # of transformers, no encoder's


class _PresentConfigs:
    """`sub_configs` as transformers asks for it: of the class all that there may be, of a config those that it has."""

    def __get__(self, config: PretrainedConfig | None, owner: type) -> dict[str, type[PretrainedConfig]]:
        names = ENCODER_CONFIGS if config is None else config.modalities
        return {f"{name}_config": ENCODER_CONFIGS[name] for name in names}


class ResonanceMultimodalConfig(PretrainedConfig):
    """Config of the models that see, hear and read (`ResonanceMultimodalModel` and its heads).

    Args:
        text_config, vision_config, audio_config: configs of the encoders, or dicts with their arguments; two of them or
            all three. The text encoder is bidirectional. None: the model lacks this modality.
        fusion: how the features of the modalities become one vector.
            `"binding"`: each becomes a vector of phasors, is bound to the role of its modality, and what is superposed
            is every modality, every pair bound together, and all three; one can be read back by its role.
            `"superposition"`: the phasors are added, without roles.
            `"concatenation"`: they stand side by side.
        hidden_size: width of the phasors of one modality, two numbers each; also that of the fused vector, which is
            as many times wider as there are modalities for concatenation. Default: twice the widest encoder.
        projection_dim: width of the space in which the contrastive model compares. Default: the widest encoder.
        modality_dropout: in training, the probability with which a modality of an example is taken away; one always
            stays. The contrastive model, which compares them one by one, does without.
        classifier_dropout: dropout before the layers of a classification head.
        logit_scale_init_value: with whose exponential the contrastive model multiplies cosines, at the start.
        norm_eps: epsilon of the normalisations.
        kwargs: arguments of [`~transformers.PretrainedConfig`].

    Raises:
        ValueError: fewer than two modalities, one that is unknown, a config of another family, a causal text encoder,
            an unknown `fusion`, an odd `hidden_size`, or a value out of range.
    """

    model_type = "resonance_multimodal"
    has_no_defaults_at_init = True  # two modalities are needed
    sub_configs = _PresentConfigs()  # type: ignore[assignment]  # transformers declares a dict

    def __init__(
        self,
        *,
        text_config: ResonanceConfig | dict[str, Any] | None = None,
        vision_config: ResonanceVisionConfig | dict[str, Any] | None = None,
        audio_config: ResonanceAudioConfig | dict[str, Any] | None = None,
        fusion: str = "binding",
        hidden_size: int | None = None,
        projection_dim: int | None = None,
        modality_dropout: float = 0.2,
        classifier_dropout: float = 0.0,
        logit_scale_init_value: float = 2.6592,
        norm_eps: float = 1e-5,
        **kwargs: Any,
    ) -> None:
        given = {"text": text_config, "vision": vision_config, "audio": audio_config}
        _check_modalities([name for name, config in given.items() if config is not None], kwargs)
        for name, config in given.items():
            setattr(self, f"{name}_config", None if config is None else _encoder_config(name, config))
        widest = max(getattr(self, key).hidden_size for key in self.sub_configs)
        self.fusion = fusion
        self.hidden_size = 2 * widest if hidden_size is None else hidden_size
        self.projection_dim = widest if projection_dim is None else projection_dim
        self.modality_dropout = modality_dropout
        self.classifier_dropout = classifier_dropout
        self.logit_scale_init_value = logit_scale_init_value
        self.norm_eps = norm_eps
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Raise ValueError where an argument is out of range."""
        check_choice("fusion", self.fusion, FUSIONS)
        check_positive(WIDEST, hidden_size=self.hidden_size, projection_dim=self.projection_dim)
        check_divides("2", 2, "hidden_size", self.hidden_size)
        check_probability(modality_dropout=self.modality_dropout, classifier_dropout=self.classifier_dropout)

    @property
    def modalities(self) -> list[str]:
        """Those that it has, in the order "text", "vision", "audio": the columns of a `modality_mask`."""
        return [name for name in ENCODER_CONFIGS if getattr(self, f"{name}_config", None) is not None]

    @property
    def fused_size(self) -> int:
        """Width of the fused vector."""
        return self.hidden_size * (len(self.modalities) if self.fusion == "concatenation" else 1)


def _check_modalities(modalities: list[str], others: dict[str, Any]) -> None:
    for name in others:
        if name.endswith("_config") and name not in OTHER_CONFIGS:
            known = ", ".join(f"{modality}_config" for modality in ENCODER_CONFIGS)
            raise ValueError(f"{name}: there is no such modality; give two of {known}, or all")
    if len(modalities) < 2:
        has = f"only {modalities[0]}_config" if modalities else "none"
        raise ValueError(f"text_config, vision_config, audio_config: {has} is given; two are needed, or all three")


def _encoder_config(name: str, given: Any) -> PretrainedConfig:
    """The config of an encoder, from one or from its arguments."""
    config_class = ENCODER_CONFIGS[name]
    if isinstance(given, dict):
        model_type = given.get("model_type", config_class.model_type)
        check_choice(f"{name}_config['model_type']", model_type, (config_class.model_type,))
        config = config_class(**given)
    elif isinstance(given, config_class):
        config = copy.deepcopy(given)
    else:
        raise ValueError(f"{name}_config is a {type(given).__name__}; give a {config_class.__name__}, or its arguments")
    if name == "text":
        if config.causal:
            raise ValueError("text_config: causal=True, but the text encoder reads both ways; give causal=False")
        config.causal = False
        config.check()
    return config
