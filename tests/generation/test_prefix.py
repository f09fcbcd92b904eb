"""A text that was read once: as a file, continued by its own model only, in branches and in batches."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import new_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from hf_holo import HsnConfig, Prefix, RecurrentCache, get_architecture, prefix
from hf_holo.errors import HoloError
from hf_holo.modeling.cache import CACHE_NAME
from hf_holo.modeling.state_file import config_arguments

FAMILIES = ["hsn", "holo", "resonance"]
VARIANTS = [(family, variant) for family in FAMILIES for variant in get_architecture(family).variants]
PLAIN = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 6}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def speaker(family: str, variant: str | None = None, seed: int = 0, **overrides):
    """With large weights, so that it says more than one token."""
    model = new_model(family, variant=variant, **overrides)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.4)
    return model


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.feature("generation", "a text saved as a file")
@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_a_file_is_continued_as_the_text_itself(tmp_path, monkeypatch, family, variant):
    """In another process' stead: a model with the same weights. Read in segments, with padding inside."""
    monkeypatch.setattr(prefix, "SEGMENT", 7)
    if not get_architecture(family).config(**get_architecture(family).variants[variant]).is_causal:
        pytest.skip("it fills masks")
    model, ids, question = speaker(family, variant), tokens(2, 20), tokens(2, 3, seed=1)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    Prefix.read(model, ids, mask).save(tmp_path / "text")
    loaded = Prefix.load(tmp_path / "text", speaker(family, variant))
    everything = torch.cat([ids, question], 1), torch.cat([mask, torch.ones_like(question)], 1)
    whole = dict(zip(("input_ids", "attention_mask"), everything, strict=True))
    assert loaded.cache.get_seq_length() == 19
    inputs = loaded.followed_by(question)
    assert torch.equal(inputs["input_ids"], whole["input_ids"])
    for _ in range(2):  # the first time changes nothing for the second
        assert torch.equal(model.generate(**loaded.followed_by(question), **PLAIN), model.generate(**whole, **PLAIN))


@pytest.mark.parametrize("family", ["hsn", "resonance"])
@torch.no_grad()
def test_a_cache_is_saved_and_loaded(tmp_path, family):
    model, ids = new_model(family), tokens(2, 12)
    cache = model(ids[:, :7], use_cache=True)[CACHE_NAME]
    cache.save(tmp_path / "state", model)
    loaded = RecurrentCache.load(tmp_path / "state", model)
    assert loaded.get_seq_length() == 7
    whole = model(ids).logits[:, 7:]
    torch.testing.assert_close(model(ids[:, 7:], **{CACHE_NAME: loaded}).logits, whole, **CLOSE)
    with pytest.raises(ValueError, match="holds a state without its tokens"):
        Prefix.load(tmp_path / "state", model)
    headless = RecurrentCache.load(tmp_path / "state", model.model)  # the states are the body's
    torch.testing.assert_close(model(ids[:, 7:], **{CACHE_NAME: headless}).logits, whole, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_branches_do_not_touch_each_other(family):
    model, ids = speaker(family), tokens(1, 9)
    start = Prefix.read(model, ids)
    left, right = (start.extended(tokens(1, 4, seed)) for seed in (1, 2))
    for branch, seed in ((left, 1), (right, 2), (start, None)):
        text = ids if seed is None else torch.cat([ids, tokens(1, 4, seed)], 1)
        said = model.generate(**branch.followed_by(tokens(1, 0)), **PLAIN)
        assert torch.equal(said, model.generate(text, **PLAIN))


@pytest.mark.parametrize("family", FAMILIES)
def test_questions_to_one_text_as_a_batch(family):
    model, ids, questions = speaker(family), tokens(1, 9), tokens(3, 4, seed=1)
    rows = Prefix.read(model, ids).repeat(3)
    expected = model.generate(torch.cat([ids.expand(3, -1), questions], 1), **PLAIN)
    assert torch.equal(model.generate(**rows.followed_by(questions), **PLAIN), expected)
    one = model.generate(**rows.followed_by(questions[:1]), **PLAIN)
    assert torch.equal(one, expected[:1].expand(3, -1))


@pytest.mark.feature("generation", "several saved texts in a batch")
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_of_different_lengths_in_one_batch(family):
    model, question = speaker(family), tokens(1, 3, seed=9)
    texts = [tokens(1, length, seed=length) for length in (5, 11, 2)]
    rows = Prefix.stack([Prefix.read(model, text) for text in texts])
    said = model.generate(**rows.followed_by(question), **PLAIN)
    for row, text in zip(said, texts, strict=True):
        alone = model.generate(torch.cat([text, question], 1), **PLAIN)
        assert torch.equal(row[11 - text.shape[1] :], alone[0])


def test_what_cannot_be_stacked_is_refused():
    model = new_model("hsn", mixer_types=["attention"] * 2, num_hidden_layers=2)
    short, long = (Prefix.read(model, tokens(1, length)) for length in (5, 9))
    with pytest.raises(ValueError, match="caches: the states 'keys' differ in shape"):
        Prefix.stack([short, long])
    assert Prefix.stack([long, long]).input_ids.shape == (2, 9)
    for nothing in ([], [Prefix.empty(model)]):
        with pytest.raises(ValueError, match="prefixes: give at least one"):
            Prefix.stack(nothing)
    with pytest.raises(ValueError, match="caches: give at least one"):
        RecurrentCache.stack([])


def test_a_model_of_transformers_keeps_its_keys(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=16, n_layer=2, n_head=2)).eval()
    ids, question = tokens(2, 9), tokens(2, 3, seed=1)
    Prefix.read(model, ids).save(tmp_path / "text")
    said = model.generate(**Prefix.load(tmp_path / "text", model).followed_by(question), **PLAIN)
    assert torch.equal(said, model.generate(torch.cat([ids, question], 1), **PLAIN))


# ---------------------------------------------------------------------------------------------- refusals
@pytest.fixture
def saved(tmp_path) -> Path:
    Prefix.read(new_model("hsn"), tokens(1, 9)).save(tmp_path / "text")
    return tmp_path / "text"


def other_value(model):
    """One value of one matrix, by the least that its type allows."""
    weight = model.model.layers[0].mixer.out_proj.weight.data
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
    return model


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda: new_model("resonance"), "family 'hsn', this one has 'resonance'"),
        (lambda: new_model("hsn").bfloat16(), "dtype 'float32', this one has 'bfloat16'"),
        (lambda: new_model("hsn", norm_eps=1e-6), "other config"),
        (lambda: other_value(new_model("hsn")), "other weights"),
    ],
)
def test_another_model_is_refused(saved, change, difference):
    for load in (Prefix.load, RecurrentCache.load):
        with pytest.raises(ValueError, match=rf"path: .*text' was saved by another model \({difference}\)"):
            load(saved, change())


def test_what_changes_no_state_is_no_other_model(saved):
    model = new_model("hsn", use_cache=False, eos_token_id=3)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1)
    assert Prefix.load(saved, model).input_ids.shape == (1, 9)


def test_an_option_of_a_newer_release_is_another_model_where_it_is_used():
    class Newer(HsnConfig):
        def __init__(self, *, sides=(1, 2), num_phases=7, **kwargs):
            self.sides = list(sides)
            super().__init__(num_phases=num_phases, **kwargs)

    sizes = {"vocab_size": 9, "hidden_size": 16}
    known = config_arguments(HsnConfig(**sizes))
    assert known["hidden_size"] == 16 and "drift_base" not in known
    assert config_arguments(Newer(**sizes, num_phases=known["num_phases"])) == known
    assert config_arguments(Newer(**sizes, sides=[3])).items() >= {"sides": [3]}.items()


def test_damaged_files_are_refused(saved, tmp_path):
    model, whole = new_model("hsn"), saved.read_bytes()
    for length in (0, 5, 100, len(whole) - 1):
        saved.write_bytes(whole[:length])
        with pytest.raises(OSError, match=r"path: .*text' is not a complete safetensors file"):
            Prefix.load(saved, model)
    saved.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    with pytest.raises(OSError, match=r"path: .*text' is damaged"):
        Prefix.load(saved, model)
    with pytest.raises(OSError, match=r"path: .*nowhere' is not a file"):
        Prefix.load(tmp_path / "nowhere", model)


def test_other_files_are_refused(saved, tmp_path):
    model = new_model("hsn")
    save_file({"x": torch.zeros(3)}, tmp_path / "weights")
    with pytest.raises(ValueError, match=r"path: .*weights' is not the state after a text"):
        Prefix.load(tmp_path / "weights", model)
    save_file(load_file(saved), tmp_path / "newer", {"kind": "hf_holo prefix", "format": "2", "hf_holo": "9.9.9"})
    with pytest.raises(ValueError, match=r"path: .*newer' was written by hf_holo 9\.9\.9, in a newer format"):
        Prefix.load(tmp_path / "newer", model)


def test_a_file_keeps_its_content_until_the_new_one_is_complete(saved, monkeypatch):
    before = saved.read_bytes()

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("hf_holo.modeling.state_file.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        Prefix.read(new_model("hsn"), tokens(1, 5)).save(saved)
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]
    with pytest.raises(FileNotFoundError, match=r"path: .* in a folder that does not exist"):
        Prefix.read(new_model("hsn"), tokens(1, 5)).save(saved.parent / "no" / "text")


def test_a_model_that_returns_no_cache_is_refused():
    with pytest.raises(HoloError, match="model: HsnForMaskedLM returns no cache"):
        Prefix.read(new_model("hsn", "AutoModelForMaskedLM"), tokens(1, 5))


def test_the_size_does_not_grow_with_the_text(tmp_path):
    model, sizes = new_model("resonance"), []
    for length in (50, 500):
        Prefix.read(model, tokens(1, length)).save(tmp_path / "text")
        sizes.append((tmp_path / "text").stat().st_size)
    assert sizes[1] - sizes[0] <= 5 * 450 + 16  # four bytes for a token, one for its mask


def test_a_checkpoint_that_was_saved_and_loaded_is_the_same_model(saved, tmp_path):
    new_model("hsn").save_pretrained(tmp_path / "model")
    assert Prefix.load(saved, AutoModelForCausalLM.from_pretrained(tmp_path / "model")).input_ids.shape == (1, 9)
