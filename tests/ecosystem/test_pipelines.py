"""Every head for text in the pipeline that it is made for."""

import pytest
import torch
from transformers import pipeline

from hf_holo import get_architecture
from hf_holo.data.tokenizers import character_tokenizer
from hf_holo.hub.card import PIPELINES

pytestmark = pytest.mark.feature("pipelines", "{worker[1]}")
READERS = [(head, task) for head, task in PIPELINES.items() if head in get_architecture("hsn").models]
TEXTS = ["abba", "a longer text, padded against the others", "so"]


@pytest.fixture(scope="module")
def tokenizer():
    made = character_tokenizer(TEXTS)
    made.add_special_tokens({"mask_token": "<|mask|>"})
    return made


@pytest.fixture(params=READERS, ids=[task for _, task in READERS])
def worker(request, tiny, family, tokenizer):
    """Task and pipeline."""
    head, task = request.param
    model = tiny(family, head, vocab_size=len(tokenizer))
    return task, pipeline(task, model=model, tokenizer=tokenizer, device="cpu")


def test_a_pipeline_works(worker, tokenizer):
    task, pipe = worker
    if task == "text-generation":
        outputs = pipe(TEXTS, max_new_tokens=5, do_sample=False, batch_size=3, return_full_text=False)
        assert all(isinstance(output[0]["generated_text"], str) for output in outputs)
    elif task == "fill-mask":
        outputs = pipe([text + tokenizer.mask_token for text in TEXTS], top_k=2)
        assert all(len(output) == 2 and 0 < output[0]["score"] <= 1 for output in outputs)
    elif task == "token-classification":
        assert all({entry["entity"] for entry in pipe(text)} <= {"LABEL_0", "LABEL_1", "LABEL_2"} for text in TEXTS)
    elif task == "text-classification":
        alone = [pipe(text)[0]["score"] for text in TEXTS]
        together = [entry["score"] for entry in pipe(TEXTS, batch_size=3)]
        torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
    else:
        assert [len(output[0]) for output in pipe(TEXTS)] == [len(tokenizer(text).input_ids) for text in TEXTS]


def test_a_saved_pipeline_says_the_same(worker, tokenizer, tmp_path):
    task, pipe = worker
    pipe.save_pretrained(tmp_path)
    again = pipeline(task, str(tmp_path), device="cpu")
    assert type(again.model) is type(pipe.model) and type(again.tokenizer) is type(tokenizer)
    text = TEXTS[1] + tokenizer.mask_token
    options = {"max_new_tokens": 5, "do_sample": False} if task == "text-generation" else {}
    assert again(text, **options) == pipe(text, **options)


@pytest.mark.feature("pipelines", "zero-shot-classification")
def test_zero_shot_classification(tiny, family, tokenizer):
    names = ["contradiction", "neutral", "entailment"]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    model = tiny(family, "AutoModelForSequenceClassification", vocab_size=len(tokenizer), **labels)
    pipe = pipeline("zero-shot-classification", model=model, tokenizer=tokenizer, device="cpu")
    for output in pipe(TEXTS, candidate_labels=["long", "short"]):
        assert sorted(output["labels"]) == ["long", "short"]
        assert sum(output["scores"]) == pytest.approx(1)
