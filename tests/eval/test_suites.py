"""`hf-holo eval`: what the suites measure is right, is measured once, and is told; a model that leaks is refused."""

import csv
import json
import math

import pytest
import torch
from small_models import new_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_holo import HoloError, cli, evaluate
from hf_holo.data.scoring import held_out_loss, summed_by_position, summed_over
from hf_holo.data.tokenizers import byte_tokenizer
from hf_holo.data.windows import SlidingWindows, encode, scoring_windows
from hf_holo.eval import command
from hf_holo.eval.conformance import CausalityReport
from hf_holo.eval.conformance.subject import perturb
from hf_holo.eval.suites import SUITES, Options, Part, Run, branches, language, long, recall, speed
from hf_holo.eval.suites.models import Evaluated, load
from hf_holo.eval.suites.peers import CLOSE, PEERS, peer
from hf_holo.eval.tasks import Pairs, Repeat
from hf_holo.modeling.losses import IGNORED

TEXT = "It is the east, and Juliet is the sun. Arise, fair sun, and kill the envious moon. " * 12
SMALL = {"block_size": 32, "eval_windows": 3, "lengths": (16, 32), "repeats": 1}


@pytest.fixture
def model() -> Evaluated:
    tokenizer = byte_tokenizer()
    return Evaluated("mine", new_model("hsn", vocab_size=len(tokenizer)), tokenizer)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def tiny_llama(positions: int = 64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=258, max_position_embeddings=positions, pad_token_id=0, **sizes)
    return LlamaForCausalLM(config).eval()


# Language -----------------------------------------------------------------------------------------------------------
def test_blocks_are_scored_as_all_commands_score(model):
    (row,) = language.score(model, [TEXT], "blocks", Options(block_size=32))
    ids = encode(model.tokenizer, [TEXT])
    assert row["loss"] == held_out_loss(model.model, scoring_windows(ids, 32), 4, model.tokenizer.pad_token_id)
    assert row["tokens"] == len(ids) - 1 and row["share"] == 1
    size = len(TEXT) - 1  # all tokens are bytes, and the first is not predicted
    assert row["bits_per_byte"] == pytest.approx(row["loss"] / math.log(2) * row["tokens"] / size)
    assert row["word_perplexity"] == pytest.approx(math.exp(row["loss"] * row["tokens"] / len(TEXT.split())))


@pytest.mark.parametrize("count", [5, 16, 17, 40, 41, 100])
def test_sliding_windows_predict_every_token_once(count):
    windows = SlidingWindows(torch.arange(count).numpy(), 16, 8)
    predicted = [label for w in windows for label in w["labels"].tolist() if label != IGNORED]
    assert predicted == list(range(1, count))
    for window in windows:
        first = int((window["labels"] != IGNORED).nonzero()[0])
        assert first >= 8 or window["input_ids"][0] == 0  # half a window before it, but at the beginning


def test_positions_add_up_to_the_loss(model):
    windows = scoring_windows(encode(model.tokenizer, [TEXT]), 32)
    totals = summed_by_position(model.model, windows, 4)
    nats, tokens, _ = summed_over(model.model, windows, 4)
    assert totals.shape == (32, 2) and totals[0].tolist() == [0, 0]
    torch.testing.assert_close(totals.sum(0), torch.stack([nats, tokens]), rtol=1e-6, atol=0)
    rows = language.by_position(model, [TEXT], Options(block_size=32))
    assert [row["tokens_before"] for row in rows] == [1, 2, 4, 8, 16]
    assert sum(row["tokens"] for row in rows) == tokens


@pytest.mark.parametrize(
    ("marked", "plain"),
    [
        ("a well @-@ known 1 @,@ 000 miles", "a well-known 1,000 miles"),
        ("Yes , he said ( twice ) .", "Yes, he said (twice)."),
        ('It is " good " , it \'s fine', 'It is "good", it\'s fine'),
        ("as it is, already", "as it is, already"),
    ],
)
def test_the_marks_of_wikitext_go(marked, plain):
    assert language.written(marked) == plain


# Recall and long ----------------------------------------------------------------------------------------------------
class LooksUp(nn.Module):
    """Says after every token what followed it the last time."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids):
        logits = torch.zeros(*input_ids.shape, 61)
        for row, ids in enumerate(input_ids.tolist()):
            for t, token in enumerate(ids):
                seen = [s for s in range(t) if ids[s] == token]
                logits[row, t, ids[seen[-1] + 1] if seen else 0] = 1.0
        return type("Output", (), {"logits": logits})


def test_who_looks_up_finds_every_pair_and_who_does_not_guesses(model):
    generator = torch.Generator().manual_seed(0)
    task = Pairs(8, 20, distinct=True)
    question = recall.ask(task, torch.arange(1, 61), 4, task.length(5), generator)
    assert question.ids.shape == (4, 4 * 8 + 5 - 1)
    assert recall.answer(Evaluated("finder", LooksUp()), question) == (1.0, 1.0)
    untrained = recall.answer(model, recall.ask(Pairs(8, 83, distinct=True), torch.arange(1, 250), 32, 36, generator))
    assert untrained[0] < 0.1 and untrained[1] < 0.4


def test_copies_come_twice():
    question = recall.ask(Repeat(100), torch.arange(100, 200), 3, 11, torch.Generator().manual_seed(0))
    assert question.ids[:, :5].equal(question.ids[:, 6:]) and question.ids.min() >= 100
    assert question.places.tolist() == [6, 7, 8, 9, 10] and question.answers.equal(question.ids[:, 1:6])


def test_a_pass_key_is_found_by_who_looks_up(model):
    class Finder(LooksUp):
        """Says what followed the last six tokens, the last time."""

        def forward(self, input_ids, use_cache):
            logits = torch.zeros(*input_ids.shape, 258)
            for row, ids in enumerate(input_ids.tolist()):
                for t in range(5, len(ids)):
                    seen = [s for s in range(5, t) if ids[s - 5 : s + 1] == ids[t - 5 : t + 1]]
                    logits[row, t, ids[seen[-1] + 1] if seen else 0] = 1.0
            return type("Output", (), {"logits": logits})

        config = model.model.config

    finder = Evaluated("finder", Finder(), model.tokenizer)
    (row,) = long.with_pass_key(finder, [TEXT], 160, seed=0)
    assert row["named"] == 1 and row["sequences"] == long.KEYS and row["chance"] == pytest.approx(10 ** (-5 / 6))
    assert long.with_pass_key(finder, [TEXT], 20, seed=0) == []


def test_the_same_tokens_are_predicted_from_every_context(model):
    ids = torch.from_numpy(encode(model.tokenizer, [TEXT])).long()
    (short,), (whole,) = (long.with_context(model, ids, length, 64) for length in (16, 64))
    assert short["tokens"] == whole["tokens"] == long.PLACES * long.TARGETS
    assert short["loss"] != whole["loss"]
    llama = Evaluated("llama", tiny_llama(positions=100), model.tokenizer)
    assert long.with_context(llama, ids, 64, 64) == []  # 64 and 64 are more than 100


# Branches -------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained() -> Evaluated:
    """A hybrid that has learned the text, whose window writes nothing to the residual stream."""
    tokenizer = byte_tokenizer()
    layers = {"num_hidden_layers": 3, "mixer_types": ["window", "holographic", "attention"], "window": 8}
    model = new_model("hsn", vocab_size=len(tokenizer), **layers).train()
    torch.nn.init.zeros_(model.model.layers[0].mixer.out_proj.weight)
    model.model.layers[0].mixer.requires_grad_(False)
    ids = torch.from_numpy(encode(tokenizer, [TEXT])).long()[:256].view(8, 32)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(60):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return Evaluated("hybrid", model.eval(), tokenizer)


def test_a_branch_that_adds_nothing_is_worth_nothing(trained):
    rows = {(row["layer"], row["kind"]): row for row in branches.score(trained, [TEXT], Options(block_size=32))}
    kinds = ["window", "holographic", "attention"]
    assert list(rows) == [*enumerate(kinds), *((None, kind) for kind in kinds)]
    whole = held_out_loss(
        trained.model, scoring_windows(encode(trained.tokenizer, [TEXT]), 32), 4, trained.tokenizer.pad_token_id
    )
    assert all(row["loss"] == whole and row["worth"] == row["without"] - whole for row in rows.values())
    assert rows[0, "window"]["worth"] == rows[None, "window"]["worth"] == 0.0
    assert rows[1, "holographic"]["worth"] > 0.1 and rows[2, "attention"]["worth"] > 0.1


def test_mixers_of_a_kind_are_switched_off_together_and_on_again(model):
    rows = branches.score(model, [TEXT], Options(**SMALL))
    assert [(row["layer"], row["mixers"]) for row in rows] == [(0, 1), (1, 1), (None, 2)]
    ids = torch.arange(1, 9)[None]
    whole = model.model(ids).logits
    with branches.without(branches.mixers_of(model.model)):
        alone = torch.cat([model.model(token).logits for token in ids.split(1, 1)], 1)
        torch.testing.assert_close(model.model(ids).logits, alone)  # nothing but mixers lets tokens meet
    assert torch.equal(model.model(ids).logits, whole) and not torch.allclose(whole, alone)


def test_branches_are_drawn_and_written_and_a_model_without_mixers_is_left_out(trained, text, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "causality_of", lambda *_: CausalityReport((), None, None))  # it takes long
    given = [(trained.model, trained.tokenizer), (tiny_llama(), trained.tokenizer)]
    options = {"output_dir": tmp_path, "eval_file": (str(text),), **SMALL}
    told = evaluate(given, "branches", **options).read_text(encoding="utf-8")
    assert "| layer 0, window | 1 |" in told and "| all attention | 1 |" in told and " 0.000 |" in told
    assert "LlamaForCausalLM is left out: none of its blocks has a `mixer` that could be switched off." in told
    assert (tmp_path / "branches.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "branches_ablations.csv").open(newline="", encoding="utf-8") as file:
        assert [float(row["worth"]) for row in csv.DictReader(file) if row["kind"] == "window"] == [0.0, 0.0]


# Speed --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", PEERS)
def test_peers_are_as_large(kind, model):
    wanted = sum(p.numel() for p in model.model.parameters())
    built = peer(kind, model.model, 64)
    got = sum(p.numel() for p in built.parameters())
    assert abs(got / wanted - 1) <= CLOSE, (got, wanted)
    with torch.no_grad():
        assert built(input_ids=torch.ones(1, 64, dtype=torch.long)).logits.isfinite().all()


def test_speed_measures_every_kind_next_to_the_peers(model):
    options = Options(**SMALL, peers=("llama", "mamba"))
    for part in speed.parts([model, Evaluated("short", tiny_llama(positions=18))], options):
        rows = part.measure(None)
        assert [row["model"] for row in rows] == ["mine", "short", "llama, as large", "mamba, as large"]
        for row in rows:
            if row["model"] == "short" and row["tokens"] + 3 * (part.table == "decoding") > 18:
                assert row["not_measured"] == "it takes 18 tokens" and row["seconds"] is None
            else:
                assert row["seconds"] > 0 and row["peak_bytes"] > 0 and row["not_measured"] is None


def test_an_unknown_peer_is_named(model):
    with pytest.raises(HoloError, match="unknown peer 'lama': did you mean 'llama'"):
        list(speed.parts([model], Options(peers=("lama",))))


# A run --------------------------------------------------------------------------------------------------------------
def test_a_failed_part_is_named_and_tried_again(tmp_path):
    asked = []

    def part(name: str, error: Exception | None = None) -> Part:
        def measure(seconds):
            asked.append(name)
            if error:
                raise error
            return [{"model": name, "x": 1}]

        return Part("table", name, {}, measure)

    parts = [part("good"), part("bad", ValueError("no such thing")), part("better")]
    for expected in (["good", "bad", "better"], ["bad"]):
        asked.clear()
        outcome = Run(tmp_path).measure("suite", parts)
        assert asked == expected
        assert [row["model"] for row in outcome.tables["table"]] == ["good", "better"]
        assert outcome.left_out == {"bad": "ValueError: no such thing"}


def test_nothing_is_begun_after_the_budget(tmp_path):
    part = Part("table", "late", {}, lambda seconds: pytest.fail("was begun"))
    assert Run(tmp_path, budget=0.0).measure("suite", [part]).left_out == {"late": "the budget was used up"}


@pytest.mark.parametrize(("given", "seconds"), [("90", 90), ("90s", 90), ("30m", 1800), ("1.5h", 5400), (60, 60)])
def test_budgets(given, seconds):
    assert command.seconds_of(given) == seconds


def test_a_run_writes_everything_and_measures_nothing_twice(model, text, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    options = {"output_dir": folder, "eval_file": (str(text),), **SMALL}
    report = evaluate([(model.model, model.tokenizer)], "language", **options)
    told = report.read_text(encoding="utf-8")
    assert "HsnForCausalLM" in told and "no look-ahead" in told and "![Loss by position](language.png)" in told
    assert (folder / "language.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((folder / "language.json").read_text(encoding="utf-8"))
    with (folder / "language_protocols.csv").open(newline="", encoding="utf-8") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert losses == [row["loss"] for row in record["tables"]["protocols"]] and len(losses) == 3

    for name in ("score", "by_position"):
        monkeypatch.setattr(language, name, lambda *_: pytest.fail("a finished part was measured again"))
    monkeypatch.setattr(command, "causality_of", lambda *_: pytest.fail("looked for a leak again"))
    again = json.loads(
        (evaluate([(model.model, model.tokenizer)], "language", **options).parent / "language.json").read_text()
    )
    assert again["tables"] == record["tables"]


def test_other_weights_are_another_measurement(model):
    before = model.fingerprint
    with torch.no_grad():
        model.model.model.norm.weight[0] += 0.5
    assert Evaluated("mine", model.model).fingerprint != before


@pytest.mark.slow
def test_a_model_that_leaks_is_refused(wrong_models, text, tmp_path):
    tokenizer = byte_tokenizer()
    leaking = perturb(wrong_models.new_toy("Recurrence", "CircularGate", vocab_size=len(tokenizer)))
    options = {"output_dir": tmp_path / "out", "eval_file": (str(text),), **SMALL}
    with pytest.raises(HoloError, match=r"looks .* tokens ahead.*--allow-leaks"):
        evaluate([(leaking, tokenizer)], "language", **options)
    report = evaluate([(leaking, tokenizer)], "language", allow_leaks=True, **options)
    assert "looks" in report.read_text(encoding="utf-8")


def test_a_preset_has_random_weights_and_reads_bytes():
    loaded = load("hsn-tiny")
    assert loaded.vocab_size == len(byte_tokenizer()) and loaded.max_length is None


def test_the_command(model, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "causality_of", lambda *_: CausalityReport((), None, None))  # it takes long
    checkpoint, folder = tmp_path / "checkpoint", tmp_path / "out"
    model.model.save_pretrained(checkpoint)
    model.tokenizer.save_pretrained(checkpoint)
    words = ["--suite", "long", "--eval_file", str(text), "--lengths", "16", "32", "--output_dir", str(folder)]
    assert cli.main(["eval", str(checkpoint), *words]) == 0
    assert "tokens of context" in capsys.readouterr().out and (folder / "long_contexts.csv").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--suite", "langage"], "unknown suite 'langage': did you mean 'language'?"),
        (["--budget", "soon"], "budget: 'soon' is not a time; accepted are 90s, 30m, 1.5h"),
        (["--suite", "zero-shot"], "zero_shot_data: None holds none of lambada.jsonl"),
        (["--block_size", "0"], "block_size: 0 must be at least 1"),
        (["--device", "abacus"], "--device: 'abacus' cannot be used"),
    ],
)
def test_what_is_wrong_is_said_early(words, message, capsys, tmp_path):
    assert cli.main(["eval", "hsn-tiny", "--output_dir", str(tmp_path), *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.json"))


def test_every_suite_says_what_it_is():
    for name, suite in SUITES.items():
        assert suite.__doc__ and callable(suite.parts) and callable(suite.told), name
