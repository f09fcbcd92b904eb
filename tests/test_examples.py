"""The scripts in examples run, at their smallest, and say the truth about themselves."""

import importlib
import json
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from hf_holo import HsnConfig, HsnForMaskedLM
from hf_holo.training.data import stdlib_sources
from hf_holo.training.tokenizers import make_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.exists(), reason="the examples live in the repository only")
SMALL = ("--packages", "json", "tomllib", "zoneinfo", "--epochs", "1", "--width", "16", "--depth", "1")


@pytest.fixture
def classify(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.import_module("classify_python_files")
    return lambda *flags: module.main([*SMALL, "--output_dir", str(tmp_path / "out"), *flags])


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


def test_whole_reviews_are_classified_beside_a_bert(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.import_module("classify_movie_reviews")
    for split in ("train", "test"):
        texts = [word * times for times in (3, 40) for word in ("a fine film ", "a dull film ")]
        Dataset.from_dict({"text": texts, "label": [1, 0, 1, 0]}).to_parquet(str(tmp_path / f"{split}.parquet"))
    flags = "--max_steps 2 --batch_size 2 --bert_length 16 --vocab_size 270 --cpu"
    files = [str(tmp_path / f"{split}.parquet") for split in ("train", "test")]
    monkeypatch.setattr("sys.argv", ["classify", *files, *flags.split(), "--output_dir", str(tmp_path / "out")])
    module.main()
    rows = {row["model"]: row for row in json.loads((tmp_path / "out" / "reviews.json").read_text())}
    assert list(rows) == ["hsn", "resonance", "bert"] and all(0 <= row["accuracy"] <= 1 for row in rows.values())
    assert rows["hsn"]["longest_review"] == rows["resonance"]["longest_review"] > rows["bert"]["longest_review"] == 16
    sizes = [row["parameters"] for row in rows.values()]
    assert max(sizes) < 1.3 * min(sizes)


def test_every_package_with_enough_files_is_a_class(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    module = importlib.import_module("classify_python_files")
    texts, labels, classes = module.load_files(None)
    assert len(texts) == len(labels) and {"asyncio", "email", "xml"} <= set(classes)
    assert min(Counter(labels.tolist()).values()) >= module.FEWEST
