"""The scripts in examples run, at their smallest, and say the truth about themselves."""

import importlib
import json
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from hf_holo import HsnConfig, HsnForMaskedLM
from hf_holo.data.documents import stdlib_sources
from hf_holo.data.tokenizers import make_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="the examples live in the repository only")
SMALL = ("--packages", "json", "tomllib", "zoneinfo", "--epochs", "1", "--width", "16", "--depth", "1")


@pytest.fixture
def classify(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.import_module("classify_python_files")
    return lambda *flags: module.main([*SMALL, "--output_dir", str(tmp_path / "out"), *flags])


@pytest.mark.slow
def test_files_are_classified_beside_two_baselines(classify, tmp_path, capsys):
    majority, tfidf, ours = classify("--vocab_size", "600").values()
    said = capsys.readouterr().out
    files = [text for name, text in stdlib_sources().items() if name.split("/")[0] in SMALL[1:4]]
    assert f"{len(files)} files of 3 packages" in said and f"{ours:6.1%}  Resonance" in said
    assert 0 < majority <= tfidf <= 1 and 0 <= ours <= 1

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    longest = max(len(tokenizer(text).input_ids) for text in files)
    assert f"the longest: {longest:,} tokens" in said  # none was cut
    (answer,) = pipeline("text-classification", model=model, tokenizer=tokenizer)(files[0])
    assert answer["label"] in {"json", "tomllib", "zoneinfo"}


def test_it_starts_from_a_model_that_fills_masks(classify, tmp_path, capsys):
    tokenizer = make_tokenizer("bytes", [], masked=True)
    tokenizer.save_pretrained(tmp_path / "base")
    config = HsnConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, causal=False)
    HsnForMaskedLM(config).save_pretrained(tmp_path / "base")
    classify("--checkpoint", str(tmp_path / "base"), "--packages", "json", "tomllib", "--learning_rate", "0")
    trained = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    base = HsnForMaskedLM.from_pretrained(tmp_path / "base")
    assert (trained.model.embed_tokens.weight == base.model.embed_tokens.weight).all()


@pytest.fixture
def reviews(tmp_path) -> list[str]:
    """Files for training and for testing, of eight reviews each."""
    texts = [word * times for times in (3, 10, 20, 40) for word in ("a fine film ", "a dull film ")]
    for split in ("train", "test"):
        Dataset.from_dict({"text": texts, "label": [1, 0] * 4}).to_parquet(str(tmp_path / f"{split}.parquet"))
    return [str(tmp_path / f"{split}.parquet") for split in ("train", "test")]


@pytest.mark.slow
def test_whole_reviews_are_classified_beside_a_bert(monkeypatch, reviews, tmp_path, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.syspath_prepend(EXAMPLES.with_name("benchmarks"))
    flags = "--epochs 0.5 --batch_size 2 --width 32 --bert_length 16 --vocab_size 270 --learning_rates 1e-3 0 --cpu"
    folders = ["--output_dir", str(tmp_path / "out"), "--results", str(tmp_path)]
    importlib.import_module("movie_reviews").main([*reviews, *flags.split(), *folders])
    report = json.loads((tmp_path / "movie_reviews.json").read_text())
    figures = report["figures"]
    words, *rows = figures["rows"]
    assert words["accuracy"] == 1.0 and "100.0% ± 0.0%  TF-IDF" in capsys.readouterr().out  # one word tells
    assert [row["model"] for row in rows] == ["hsn", "resonance", "modernbert"]
    for row in rows:
        assert 0 <= row["accuracy"] <= 1 and set(row["validation_accuracy"]) == {"0.001", "0.0"}
    hsn, resonance, bert = rows
    assert hsn["longest_review"] == resonance["longest_review"] > bert["longest_review"] == 16
    assert hsn["tokens_in_training"] == resonance["tokens_in_training"] > bert["tokens_in_training"]
    sizes = [row["parameters"] for row in rows]
    assert max(sizes) < 1.3 * min(sizes)
    assert {"seed", "epochs", "learning_rates", "train_reviews"} <= figures["settings"].keys()
    own = json.loads((tmp_path / "out" / "reviews.json").read_text())
    assert own["rows"] == figures["rows"] and own["seconds"] > 0 and "transformers" in own["versions"]
    said = importlib.import_module("readme").table(tmp_path)
    assert "TF-IDF 100.0%" in said and "have seen 7 of them 0.5 times" in said


def test_every_package_with_enough_files_is_a_class(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.import_module("classify_python_files")
    texts, labels, classes = module.load_files(None)
    assert len(texts) == len(labels) and {"asyncio", "email", "xml"} <= set(classes)
    assert min(Counter(labels.tolist()).values()) >= module.FEWEST
