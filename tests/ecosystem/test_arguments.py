"""An argument of forward that is not understood is never swallowed; what transformers passes to every model passes."""

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_holo import get_architecture
from hf_holo.data.tokenizers import character_tokenizer

HEADS = [*get_architecture("hsn").models]
WRONG = ["atention_mask", "past", "cache_params", "encoder_hidden_states", "is_causal"]
PROMPTS = {
    "prompt tuning": lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8),
}


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, 61, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("head", HEADS)
def test_an_unknown_argument_is_named(tiny, family, head, ids):
    model = tiny(family, head)
    for name in WRONG:
        with pytest.raises(TypeError, match=rf"{type(model).__name__}.forward\(\) got an unexpected argument '{name}'"):
            model(ids, **{name: torch.ones(2, 9)})
    with pytest.raises(TypeError, match="did you mean 'attention_mask'"):
        model(ids, atention_mask=torch.ones(2, 9))


@pytest.mark.parametrize("head", HEADS)
def test_what_they_cannot_give_is_refused(tiny, family, head, ids):
    model = tiny(family, head)
    with pytest.raises(ValueError, match="output_attentions: these models give no attention weights"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="token_type_ids: these models know no segments"):
        model(ids, token_type_ids=torch.ones_like(ids))


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
def test_what_transformers_passes_to_every_model_changes_nothing(tiny, family, head, ids):
    model = tiny(family, head)
    asks_nothing = {"output_attentions": False, "token_type_ids": torch.zeros_like(ids), "cache_position": ids[0]}
    assert torch.equal(model(ids, **asks_nothing)[0], model(ids)[0])


def test_generation_ends_at_a_string(tiny, family, ids):
    """generate() needs the tokenizer for that, and hands it on to every forward."""
    tokenizer = character_tokenizer(["abcdef"])  # the letters by which transformers tries a tokenizer
    model = tiny(family, vocab_size=len(tokenizer))
    options = {"do_sample": True, "pad_token_id": 0, "max_new_tokens": 1000}
    torch.manual_seed(0)
    said = model.generate(ids[:1] % 3, tokenizer=tokenizer, stop_strings=["ab"], **options)[0, 9:]
    assert tokenizer.decode(said).endswith("ab") and tokenizer.decode(said).count("ab") == 1


@torch.no_grad()
def test_borders_for_flash_attention_need_positions_beside_them(tiny, family, ids):
    """A collator that flattens passes both; by the borders alone documents would be taken for one."""
    rows = [{"input_ids": row.tolist()} for row in ids]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(rows)
    labels = batch.pop("labels")
    model = tiny(family)
    alone = model(ids).logits.flatten(0, 1)
    torch.testing.assert_close(model(**batch).logits[0], alone, rtol=1e-4, atol=1e-5)
    assert labels.shape == batch["input_ids"].shape
    with pytest.raises(ValueError, match="cu_seq_lens_q: give position_ids or seq_idx"):
        model(**{name: value for name, value in batch.items() if name != "position_ids"})


@torch.no_grad()
def test_documents_of_a_classified_row_do_not_see_each_other(tiny, family, ids):
    model = tiny(family, "AutoModelForSequenceClassification")
    seq_idx = torch.zeros_like(ids)
    seq_idx[:, 5:] = 1
    torch.testing.assert_close(model(ids, seq_idx=seq_idx).logits, model(ids[:, 5:]).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.feature("PEFT", "on embeddings, soft prompts")
def test_peft_on_embeddings_starts_at_the_base_model_and_trains(tiny, family, ids):
    for config in (LoraConfig(target_modules=["embed_tokens"]), LoraConfig(trainable_token_indices=[3, 5])):
        base = tiny(family, tie_word_embeddings=False)
        before = base(ids).logits.detach()
        model = get_peft_model(base, config)
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)
        model(input_ids=torch.full_like(ids, 3), labels=ids).loss.backward()
        assert any(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "embed_tokens" in n)


def decodes_after(prompt: str, model: PreTrainedModel, ids: torch.Tensor) -> bool:
    """Whether generate() with a soft prompt says what forward says of the growing text."""
    model = get_peft_model(model, PROMPTS[prompt]()).eval()
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    got, expected = model.generate(input_ids=ids, **options), ids
    with torch.no_grad():
        for _ in range(5):
            logits = model(input_ids=expected, attention_mask=torch.ones_like(expected)).logits
            expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
    return torch.equal(got[:, -5:], expected[:, -5:])


@pytest.mark.feature("PEFT", "on embeddings, soft prompts")
@pytest.mark.parametrize("prompt", PROMPTS)
def test_soft_prompts_decode_with_a_cache_as_without(tiny, family, ids, prompt):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    control = LlamaForCausalLM(LlamaConfig(vocab_size=61, pad_token_id=0, **sizes)).eval()
    torch.nn.init.normal_(control.lm_head.weight, std=0.3)
    if not decodes_after(prompt, control, ids):
        pytest.skip("this release of PEFT loses the prompt while it generates with this transformers, Llama's too")
    assert decodes_after(prompt, tiny(family, tie_word_embeddings=False), ids)


@pytest.mark.feature("PEFT", "on embeddings, soft prompts")
def test_prefix_tuning_works_where_there_are_keys_and_values(tiny, family, ids):
    model = get_peft_model(tiny(family), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    if family == "holo":
        model(input_ids=ids, labels=ids).loss.backward()
        return
    with pytest.raises(ValueError, match="past_key_values: a DynamicCache"):
        model(input_ids=ids, labels=ids)
