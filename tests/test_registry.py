"""One call registers a family everywhere; wrong types and taken names are refused, and then nothing is registered."""

import json
import sys

import pytest
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    SequenceFeatureExtractor,
)
from transformers.image_processing_utils import BaseImageProcessor

import hf_holo
from hf_holo import HoloError, registry
from hf_holo.registry import (
    architectures,
    get_architecture,
    preset_config,
    preset_model,
    presets,
    register_architecture,
)

SIZES = {"vocab_size": 11, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


class ToyConfig(LlamaConfig):
    model_type = "toy-registry"


class ToyModel(LlamaModel):
    config_class = ToyConfig


class ToyForCausalLM(LlamaForCausalLM):
    config_class = ToyConfig


class ToyTokenizer(PreTrainedTokenizerFast):
    pass


class ToyProcessor(ProcessorMixin):
    attributes = ()


class ToyImageProcessor(BaseImageProcessor):
    model_input_names = ["pixel_values"]


class ToyFeatureExtractor(SequenceFeatureExtractor):
    model_input_names = ["input_values"]


MODELS = {"AutoModel": ToyModel, "AutoModelForCausalLM": ToyForCausalLM}
TOY = {"name": "toy-registry", "config": ToyConfig, "models": MODELS, "presets": {"toy-small": SIZES}}


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """What a test registers is forgotten after it."""
    monkeypatch.setattr(registry, "_ARCHITECTURES", architectures())


def test_one_call_registers_everywhere():
    registered = register_architecture(**TOY, tokenizer=ToyTokenizer, processor=ToyProcessor, capabilities=["causal"])
    assert architectures()["toy-registry"] is registered is get_architecture("toy-registry")
    assert registered.capabilities == {"causal"}
    config = AutoConfig.for_model("toy-registry", **SIZES)
    assert type(config) is ToyConfig
    assert type(AutoModelForCausalLM.from_config(config)) is ToyForCausalLM
    assert type(preset_model("toy-small", vocab_size=7)) is ToyForCausalLM


def test_the_tokenizer_is_found_by_its_name(tmp_path):
    from tokenizers import Tokenizer, models

    register_architecture(**TOY, tokenizer=ToyTokenizer)
    ToyConfig(**SIZES).save_pretrained(tmp_path)
    ToyTokenizer(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))).save_pretrained(
        tmp_path
    )
    assert type(AutoTokenizer.from_pretrained(tmp_path)) is ToyTokenizer


@pytest.mark.parametrize("by_path", [False, True])
def test_processors_of_pictures_and_sounds_are_found_by_their_names(tmp_path, by_path):
    sys.modules.setdefault(__name__, sys.modules[ToyConfig.__module__])
    parts = {"image_processor": ToyImageProcessor, "feature_extractor": ToyFeatureExtractor}
    given = {name: f"{__name__}:{part.__name__}" if by_path else part for name, part in parts.items()}
    registered = register_architecture(**TOY, **given)
    assert (registered.image_processor, registered.feature_extractor) == tuple(parts.values())
    ToyConfig(**SIZES).save_pretrained(tmp_path)
    ToyImageProcessor().save_pretrained(tmp_path)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is ToyImageProcessor
    ToyFeatureExtractor(1, 8000, 0.0).save_pretrained(tmp_path)
    assert type(AutoFeatureExtractor.from_pretrained(tmp_path)) is ToyFeatureExtractor
    assert AutoFeatureExtractor.from_pretrained(tmp_path).sampling_rate == 8000


def test_a_processor_is_found_through_the_config(tmp_path):
    register_architecture(**TOY, processor=ToyProcessor)
    ToyConfig(**SIZES).save_pretrained(tmp_path)
    assert type(AutoProcessor.from_pretrained(tmp_path)) is ToyProcessor


def test_the_same_thing_twice_is_fine():
    assert register_architecture(**TOY) == register_architecture(**TOY)


def test_a_model_may_be_given_by_its_path():
    path = f"{__name__}:ToyForCausalLM"
    sys.modules.setdefault(__name__, sys.modules[ToyConfig.__module__])
    registered = register_architecture(**TOY | {"models": {"AutoModelForCausalLM": path}})
    assert registered.models["AutoModelForCausalLM"] is ToyForCausalLM
    assert list(registered.models.values()) == [ToyForCausalLM]
    assert type(AutoModelForCausalLM.from_config(ToyConfig(**SIZES))) is ToyForCausalLM


def test_capabilities_default_to_those_of_the_models():
    assert register_architecture(**TOY).capabilities == frozenset()
    assert get_architecture("hsn").capabilities == hf_holo.HsnForCausalLM.capabilities


def test_presets_come_from_json_files(tmp_path):
    (tmp_path / "toy-file.json").write_text(json.dumps(SIZES))
    register_architecture(**TOY | {"presets": tmp_path})
    config = preset_config("toy-file", vocab_size=5)
    assert type(config) is ToyConfig and (config.vocab_size, config.hidden_size) == (5, 16)


def test_variants_change_the_first():
    variants = {"base": SIZES, "wide": {"hidden_size": 32}}
    registered = register_architecture(**TOY, variants=variants)
    assert registered.variants == {"base": SIZES, "wide": SIZES | {"hidden_size": 32}}


def test_variants_come_from_a_json_file(tmp_path):
    path = tmp_path / "toy.json"
    path.write_text(json.dumps({"base": SIZES}))
    assert register_architecture(**TOY, variants=path).variants == {"base": SIZES}


@pytest.mark.parametrize(
    ("variants", "message"),
    [([SIZES], "is not a mapping of names"), ({"base": 3}, "variants: 'base' is 3, not a mapping")],
)
def test_bad_variants_are_refused(variants, message):
    with pytest.raises(HoloError, match=message):
        register_architecture(**TOY, variants=variants)


def test_a_missing_variants_file_is_named(tmp_path):
    with pytest.raises(HoloError, match=r"nowhere\.json' is not a file"):
        register_architecture(**TOY, variants=tmp_path / "nowhere.json")


def test_presets_are_copies():
    presets()["hsn-tiny"].kwargs["hidden_size"] = 1
    assert preset_config("hsn-tiny").hidden_size == 128


def test_a_bidirectional_preset_is_made_into_a_model_that_fills_masks():
    assert type(preset_model("python-code", hidden_size=16)).__name__ == "ResonanceForMaskedLM"
    assert type(preset_model("python-code-completion", hidden_size=16)).__name__ == "ResonanceForCausalLM"
    assert type(preset_model("hsn-tiny", causal=False)).__name__ == "HsnForMaskedLM"


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(HoloError, match=r"unknown preset 'hsn-tyni': did you mean 'hsn-tiny'\? known are .*hsn-small"):
        preset_config("hsn-tyni")


def test_an_unknown_architecture_names_the_nearest():
    with pytest.raises(HoloError, match="unknown architecture 'hsm': did you mean 'hsn'"):
        get_architecture("hsm")


class NamedAsLlama(LlamaConfig):
    model_type = "llama"


class NamedAsHsn(LlamaConfig):
    model_type = "hsn"


class LlamaAsHsn(LlamaForCausalLM):
    config_class = NamedAsHsn


class LlamaAsLlama(LlamaForCausalLM):
    config_class = NamedAsLlama


BAD = {
    "name": ({"name": "other"}, "name: 'other' differs from ToyConfig.model_type='toy-registry'"),
    "config": ({"config": dict}, "config: <class 'dict'> is not a subclass of"),
    "no models": ({"models": {}}, "models: {} does not name a model class"),
    "auto class": ({"models": {"AutoModelForMagic": ToyModel}}, "'AutoModelForMagic' is not an Auto class"),
    "model type": ({"models": {"AutoModel": dict}}, "models\\['AutoModel'\\]: <class 'dict'> is not a subclass"),
    "model config": ({"models": {"AutoModel": BertModel}}, "BertModel.config_class must be ToyConfig"),
    "tokenizer": ({"tokenizer": dict}, "tokenizer: <class 'dict'> is not a subclass of PreTrainedTokenizerBase"),
    "processor": ({"processor": dict}, "processor: <class 'dict'> is not a subclass of ProcessorMixin"),
    "image processor": ({"image_processor": dict}, "image_processor: <class 'dict'> is not a subclass of ImageProc"),
    "feature extractor": ({"feature_extractor": dict}, "feature_extractor: <class 'dict'> is not a subclass of"),
    "preset": ({"presets": {"toy-small": 3}}, "'toy-small' is 3, not a mapping"),
    "preset taken": ({"presets": {"hsn-tiny": SIZES}}, "presets: 'hsn-tiny' of 'toy-registry' is taken by .*'hsn'"),
    "taken here": (
        {"name": "hsn", "config": NamedAsHsn, "models": {"AutoModelForCausalLM": LlamaAsHsn}},
        "name: 'hsn' is already registered",
    ),
    "taken in transformers": (
        {"name": "llama", "config": NamedAsLlama, "models": {"AutoModelForCausalLM": LlamaAsLlama}},
        "name: 'llama' is taken by LlamaConfig in transformers",
    ),
}


@pytest.mark.parametrize(("changes", "message"), BAD.values(), ids=BAD)
def test_bad_registrations_are_refused(changes, message):
    before = architectures(), type(AutoConfig.for_model("llama")), type(AutoConfig.for_model("hsn"))
    with pytest.raises(HoloError, match=message):
        register_architecture(**TOY | changes)
    assert before == (architectures(), type(AutoConfig.for_model("llama")), type(AutoConfig.for_model("hsn")))


@pytest.mark.parametrize(("content", "message"), [("{", "not valid JSON"), ("[1]", "not a mapping")])
def test_bad_preset_files_are_named(tmp_path, content, message):
    (tmp_path / "toy-bad.json").write_text(content)
    with pytest.raises(HoloError, match=f"toy-bad.*{message}"):
        register_architecture(**TOY | {"presets": tmp_path})


def test_a_missing_preset_folder_is_named(tmp_path):
    with pytest.raises(HoloError, match="nowhere' is not a folder"):
        register_architecture(**TOY | {"presets": tmp_path / "nowhere"})
