"""A module of the package `evaluate`: how well a causal language model predicts texts."""

from pathlib import Path

import datasets
import evaluate
import numpy as np
import torch
from torch.utils.data import ConcatDataset
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from hf_holo.data.scoring import summed_over
from hf_holo.data.tokenizers import saved_tokenizer
from hf_holo.data.windows import encode, scoring_windows
from hf_holo.eval.metrics import LanguageScores

DESCRIPTION = """
Loss in nats per token, perplexity, bits per character, and the share of tokens that are the model's first guess, over
all tokens of all texts, each counted once. A begin- or end-of-text token, if the tokenizer has one, comes before each
text, so that its first token is predicted too. Bits per character compare models with different tokenizers.
"""
INPUTS = """
Args:
    predictions: texts.
    model: a causal language model of transformers, or the folder or Hub name of one.
    tokenizer: that belongs to it; default: the one in its folder.
    block_size: tokens that the model reads at once.
    batch_size: windows at a time.
Returns:
    loss, perplexity, accuracy, and bits_per_character.
"""


class LanguageModel(evaluate.Metric):
    """See `DESCRIPTION` and `INPUTS`."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Value("string")}),
        )

    def _compute(
        self,
        predictions: list[str],
        model: PreTrainedModel | str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        block_size: int = 256,
        batch_size: int = 8,
    ) -> dict[str, float]:
        if not isinstance(model, torch.nn.Module):
            tokenizer = tokenizer or saved_tokenizer(model, "model")
            model = AutoModelForCausalLM.from_pretrained(model)
        elif tokenizer is None:
            raise ValueError("tokenizer: None; a model that is not named by its folder needs its tokenizer as well")
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        texts = [encode(tokenizer, [text]) for text in predictions]
        if start is not None:
            texts = [np.concatenate([[start], ids]) for ids in texts]
        windows: ConcatDataset[dict[str, torch.Tensor]] = ConcatDataset(
            [scoring_windows(ids, block_size) for ids in texts]
        )
        totals = summed_over(model, windows, batch_size, tokenizer.pad_token_id or 0)
        unscored = 0 if start is not None else sum(len(tokenizer.decode(ids[:1])) for ids in texts)
        return LanguageScores(sum(map(len, predictions)) - unscored).of_sums(totals)
