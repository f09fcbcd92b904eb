"""Questions through lm-eval: ours are its tasks, and the model type `hf-holo` answers as the suite does."""

import json

import pytest
import torch
from datasets import Dataset
from small_models import new_model

from hf_holo import HoloError, evaluate
from hf_holo.data.tokenizers import byte_tokenizer
from hf_holo.eval.conformance.subject import perturb
from hf_holo.eval.suites import Options, zero_shot
from hf_holo.eval.suites.models import Evaluated

lm_eval = pytest.importorskip("lm_eval")


@pytest.fixture
def questions(tmp_path):
    """Three of each kind, in the form of the files."""
    folder = tmp_path / "questions"
    folder.mkdir()
    pairs = [
        {"query": f"It rained {n} days, so", "choices": ["the street was wet", "cats"], "gold": n % 2} for n in range(3)
    ]
    for name in ("piqa", "arc_easy", "arc_challenge", "copa"):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, pairs)) + "\n", encoding="utf-8")
    words = [{"context": f"{n} one two", "target": "three"} for n in range(3)]
    (folder / "lambada.jsonl").write_text("\n".join(map(json.dumps, words)) + "\n", encoding="utf-8")
    Dataset.from_list(
        [{"uid": f"p{n}", "field": "syntax", "good": "She sees.", "bad": "She see."} for n in range(3)]
    ).to_parquet(str(folder / "blimp.parquet"))
    return folder


@pytest.fixture
def model() -> Evaluated:
    tokenizer = byte_tokenizer()
    return Evaluated("mine", new_model("hsn", vocab_size=len(tokenizer)), tokenizer)


@torch.no_grad()
def log_probability(model: Evaluated, context: str, continuation: str) -> float:
    """Of a continuation after a context, by hand."""
    encode = model.tokenizer.encode
    before, after = encode(context), encode(continuation)
    ids = torch.tensor([before + after])
    scores = model.model(input_ids=ids).logits[0, len(before) - 1 : -1].log_softmax(-1)
    return scores[torch.arange(len(after)), after].sum().item()


def test_answers_are_those_of_the_larger_probability(model, questions):
    (row,) = zero_shot.ask(model, "copa", str(questions), Options())
    rows = [json.loads(line) for line in (questions / "copa.jsonl").read_text().splitlines()]
    right = []
    for question in rows:
        scores = [log_probability(model, question["query"], f" {choice}") for choice in question["choices"]]
        right.append(scores.index(max(scores)) == question["gold"])
    assert row["acc"] == pytest.approx(sum(right) / 3) and row["questions"] == row["of"] == 3


@pytest.mark.slow
def test_every_task_reads_its_file(model, questions, tmp_path):
    options = {"zero_shot_data": str(questions), "block_size": 32, "output_dir": tmp_path / "out"}
    told = evaluate([(model.model, model.tokenizer)], "zero-shot", **options).read_text(encoding="utf-8")
    assert all(f"| {task} |" in told for task in zero_shot.FILES) and "left out" not in told
    record = json.loads((tmp_path / "out" / "zero-shot.json").read_text(encoding="utf-8"))
    paradigms = [row["task"] for row in record["tables"]["tasks"] if "/" in row["task"]]
    assert paradigms == ["blimp/syntax/p0", "blimp/syntax/p1", "blimp/syntax/p2"]


@pytest.mark.slow
def test_lm_evals_own_way_gives_the_same(model, questions, tmp_path):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from hf_holo.eval.harness import TASKS

    checkpoint = tmp_path / "checkpoint"
    model.model.save_pretrained(checkpoint)
    model.tokenizer.save_pretrained(checkpoint)
    manager = TaskManager(include_path=TASKS, include_defaults=False, metadata={"zero_shot_data": str(questions)})
    arguments = {"pretrained": str(checkpoint), "device": "cpu", "dtype": "float32"}
    found = simple_evaluate("hf-holo", arguments, tasks=["hf_holo_lambada"], task_manager=manager, bootstrap_iters=100)
    (row,) = zero_shot.ask(model, "lambada", str(questions), Options(batch_size=1))
    assert found["results"]["hf_holo_lambada"]["perplexity,none"] == row["perplexity"]


def test_a_model_that_leaks_is_refused_there_too(wrong_models):
    from hf_holo.eval.harness import HoloLM

    leaking = perturb(wrong_models.new_toy("Recurrence", "CircularGate", vocab_size=len(byte_tokenizer())))
    with pytest.raises(HoloError, match=r"looks .* tokens ahead"):
        HoloLM(leaking, tokenizer=byte_tokenizer())
