"""transformers' own tests of models, on every registered family that reads.

The source distribution ships those of models and of configs. Its tests of generation and of pipelines import files that
it leaves out: generation is what `hf-holo check` is for, pipelines are tested in tests/ecosystem.
"""

import subprocess
import unittest

import pytest
import torch
import transformers
from shipped import shipped
from transformers import PretrainedConfig

from hf_holo import architectures
from hf_holo.registry import Architecture

pytestmark = pytest.mark.slow

try:
    mixins, configs = [shipped("test_modeling_common").ModelTesterMixin], shipped("test_configuration_common")
except (subprocess.CalledProcessError, OSError) as error:
    pytest.skip(f"no source of transformers: {getattr(error, 'stderr', error)}", allow_module_level=True)
if int(transformers.__version__.split(".")[0]) >= 5:
    mixins.append(shipped("test_training_mixin").TrainingTesterMixin)


class Sample:
    """What transformers' tests ask of a family: a small config and inputs."""

    batch_size, seq_length, is_training = 3, 7, True

    def __init__(self, architecture: Architecture):
        self.architecture, self.causal_lm_class = architecture, architecture.main_model
        config = self.get_config()
        self.hidden_size, self.num_hidden_layers = config.hidden_size, config.num_hidden_layers

    def get_config(self) -> PretrainedConfig:
        return self.architecture.config(**next(iter(self.architecture.variants.values())))

    def prepare_config_and_inputs_for_common(self) -> tuple[PretrainedConfig, dict[str, torch.Tensor]]:
        config = self.get_config()
        ids = torch.randint(1, config.vocab_size, (self.batch_size, self.seq_length))
        return config, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class FamilyTests(*mixins):
    """Base of the tests of one family."""

    architecture: Architecture
    has_attentions = False  # no family gives weights of attention,
    test_head_masking = test_pruning = False  # or lets single heads go
    test_can_init_all_missing_weights_before_2023 = True  # transformers 5 asks for it where a file names no year

    @pytest.fixture(autouse=True)
    def known_names(self, monkeypatch):
        """transformers tells from the names of its own classes which labels a model takes."""
        for auto, model in self.architecture.models.items():
            names = getattr(transformers, auto)._model_mapping._model_mapping
            monkeypatch.setitem(names, self.architecture.name, model.__name__)

    def setUp(self):
        self.model_tester = Sample(self.architecture)

    def test_config(self):
        """Properties take their place in the list as their value, and no size may be 0."""
        properties = ["pad_token_id", "num_hidden_layers", "hidden_size"]
        tester = configs.ConfigTester(
            self, config_class=self.architecture.config, common_properties=properties, hidden_size=32
        )
        tester.run_common_tests()

    @unittest.skip("the source distribution leaves GenerationTesterMixin out")
    def test_generation_tester_mixin_inheritance(self): ...

    @unittest.skip("it waits for a warning: both names of a cache are taken, in every release, without one")
    def test_bc_cache_name_forward(self): ...


def family_tests(architecture: Architecture) -> type[unittest.TestCase]:
    facts = {"architecture": architecture, "all_model_classes": tuple(architecture.models.values())}
    tests = type(f"Test{architecture.name.capitalize()}", (FamilyTests, unittest.TestCase), facts)
    return pytest.mark.feature("transformers", "its own tests of models", family=architecture.name)(tests)


READING = {name: family for name, family in architectures().items() if "AutoModelForCausalLM" in family.models}
globals().update({f"Test{name.capitalize()}": family_tests(family) for name, family in READING.items()})
