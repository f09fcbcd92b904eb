"""A transformers that was not tested, and the test before the first generation that turns garbage into an error."""

import subprocess
import sys

import pytest
import torch
import transformers

import hf_holo
from hf_holo.modeling import self_test
from hf_holo.modeling.versions import TESTED, VERSION, is_newer_than_tested

NEWER = """
import transformers
transformers.__version__ = "{version}"
import hf_holo
"""


def test_the_release_that_runs_is_not_newer_than_the_tested_ones():
    """Fails on the day of a new minor release: run the tests with it, and add it to TESTED."""
    assert not is_newer_than_tested()


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="transformers 4 takes other branches")
@pytest.mark.parametrize(("version", "lines"), [("5.999.0", 1), (f"{TESTED[-1]}.99", 0)])
def test_a_newer_transformers_is_named_once(version, lines):
    command = [sys.executable, "-c", NEWER.format(version=version)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert sum(version in line and VERSION in line for line in done.stderr.splitlines()) == lines


@pytest.fixture
def untested(monkeypatch):
    monkeypatch.setattr(self_test, "_tested", set())


def deaf(forward):
    """What a renamed argument does to a forward that swallows what it does not know."""

    def call(self, *args, **kwargs):
        known = {name: value for name, value in kwargs.items() if name not in ("past_key_values", "cache")}
        return forward(self, *args, **known | {"attention_mask": None})

    return call


def test_the_first_generation_turns_a_lost_cache_into_an_error(tiny, family, untested, monkeypatch):
    model = tiny(family, tie_word_embeddings=False)
    monkeypatch.setattr(type(model), "forward", deaf(type(model).forward))
    for _ in range(2):  # the error does not go away by trying again
        with pytest.raises(RuntimeError, match="decoding with a cache differs from decoding without one") as error:
            model.generate(torch.tensor([[5, 9, 3]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert transformers.__version__ in str(error.value) and hf_holo.__version__ in str(error.value)


def test_a_renamed_argument_is_an_error_that_names_the_versions(tiny, family, untested, monkeypatch):
    def renamed(forward):
        def call(self, *args, **kwargs):
            names = {"past_key_values": "memories", "cache": "memories"}
            return forward(self, *args, **{names.get(name, name): value for name, value in kwargs.items()})

        return call

    model = tiny(family)
    monkeypatch.setattr(type(model), "forward", renamed(type(model).forward))
    with pytest.raises(RuntimeError, match=f"'memories'.*{transformers.__version__}"):
        model.generate(torch.tensor([[5, 9, 3]]), max_new_tokens=3, do_sample=False, pad_token_id=0)


def test_defaults_of_the_model_do_not_disturb_it(tiny, family, untested, caplog):
    """Its own generation config may ask for sampling, and may have end tokens; nothing is drawn and nothing is said."""
    model = tiny(family)
    model.generation_config.update(do_sample=True, temperature=0.7, eos_token_id=[2])
    state = torch.get_rng_state()
    self_test.check_decoding(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert not [record.message for record in caplog.records if "generation_config" in record.message]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_right_models_pass_in_every_precision(tiny, family, untested, dtype):
    self_test.check_decoding(tiny(family).to(dtype))
