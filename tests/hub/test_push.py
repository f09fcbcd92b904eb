"""`hf-holo push` against a small Hub: a model arrives whole or not at all, and comes back as it was."""

import json
import re

import pytest
import torch
from huggingface_hub import ModelCard, constants, utils
from safetensors.torch import load_file, save_file
from small_hub import TOKEN, SmallHub
from transformers import AutoModelForCausalLM

from hf_holo import cli
from hf_holo.hub.card import write_card

pytestmark = pytest.mark.feature("Hub", "hf-holo push", family="hsn")
REPO = "me/tiny"

PULL = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
with torch.no_grad():
    logits = model(**tokenizer(sys.argv[2], return_tensors="pt")).logits
print(torch.equal(logits, load_file(sys.argv[3])["output"]))
"""


@pytest.fixture
def small_hub(monkeypatch):
    """A Hub that this process takes for the real one, and a token that may write."""
    with SmallHub() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # no pauses between retries
        forget_connections()
        yield served
    forget_connections()


def forget_connections() -> None:
    """huggingface_hub keeps one that was made offline."""
    forget = utils.close_session if hasattr(utils, "close_session") else utils.reset_sessions
    forget()


def push(*options: str) -> int:
    return cli.main(["push", *map(str, options)])


def test_a_model_arrives_whole(small_hub, saved, capsys):
    (saved / "training_args.bin").write_bytes(b"a pickle")
    (saved / "checkpoint-10").mkdir()
    (saved / ".hidden").write_text("x")
    (saved / "config.json.tmp12").write_text("{")
    assert push(saved, REPO) == 0
    held = small_hub.repos[REPO]
    kept_back = {"training_args.bin", ".hidden", "config.json.tmp12", "README.md"}
    expected = {path.name for path in saved.iterdir() if path.is_file()} - kept_back
    assert set(held["files"]) == expected | {"README.md"}
    assert all(held["files"][name] == (saved / name).read_bytes() for name in expected)
    assert (held["commits"], held["private"]) == (1, False)
    card = held["files"]["README.md"].decode()
    assert f'from_pretrained("{REPO}", trust_remote_code=True)' in card
    output = capsys.readouterr().out
    assert "not sent: .hidden, checkpoint-10/, config.json.tmp12, training_args.bin" in output
    assert f"The model is at {small_hub.url}/{REPO}" in output


def test_a_dry_run_sends_nothing_and_writes_nothing(small_hub, saved, capsys):
    config = json.loads((saved / "config.json").read_text())
    del config["auto_map"]
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "README.md").unlink()
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    assert push(saved, REPO, "--dry-run") == 0
    assert not small_hub.requests
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    output = capsys.readouterr().out
    for name in [*before, "README.md"]:
        assert name in output
    assert "Nothing was sent." in output and "completed by this command" in output and "a new model card" in output


def test_a_card_that_is_there_gets_the_name_of_the_repository(small_hub, saved):
    (saved / "README.md").write_text('---\ntags: [hf-holo]\n---\nAutoModel.from_pretrained("tiny")\n')
    push(saved, REPO)
    assert f'from_pretrained("{REPO}")' in small_hub.repos[REPO]["files"]["README.md"].decode()
    assert 'from_pretrained("tiny")' in (saved / "README.md").read_text()


def test_a_card_of_someone_else_stays_as_it_is(small_hub, saved, capsys):
    (saved / "README.md").write_text('mine: from_pretrained("tiny")\n')
    push(saved, REPO)
    assert small_hub.repos[REPO]["files"]["README.md"] == (saved / "README.md").read_bytes()
    assert push(saved, REPO, "--license", "mit") == 2
    assert "is your own card; write the license into its header" in capsys.readouterr().err


@pytest.mark.parametrize("metrics", [None, "step,validation_loss\n1,1.5\n"], ids=["unscored", "scored"])
def test_the_card_of_a_folder_that_has_moved_gets_the_name_of_the_repository(small_hub, saved, metrics):
    if metrics:  # then the name stands elsewhere in the header
        (saved / "metrics.csv").write_text(metrics)
        (saved / "recipe.yaml").write_text("train_file: plays.txt")
    write_card(saved)
    moved = saved.rename(saved.with_name("moved"))
    assert push(moved, REPO, "--license", "mit") == 0
    text = small_hub.repos[REPO]["files"]["README.md"].decode()
    assert re.findall(r'from_pretrained\("([^"]*)"', text) == [REPO] * 4 and f"\n# {REPO}\n" in text
    data = ModelCard(text).data
    assert (data.model_name, data.license, data.tags) == (REPO, "mit", ["hf-holo", "hsn"])
    assert bool(data.eval_results) == bool(metrics)
    assert 'from_pretrained("tiny"' in (moved / "README.md").read_text()  # here it keeps its own


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("README.md", b"\xff\xfe\x00", "README.md' is not a text in UTF-8"),
        ("README.md", b"---\na: [\n---\n", "the Hub cannot read the header of .*README.md'"),
        ("README.md", b"---\n- 1\n---\n", "the Hub cannot read the header of .*README.md'"),
        ("README.md", b"---\nmodel-index: [3]\n---\n", "the Hub cannot read the header of .*README.md'"),
    ],
)
def test_a_card_that_cannot_be_read(saved, capsys, name, content, message):
    (saved / name).write_bytes(content)
    assert push(saved, REPO, "--dry-run") == 2
    assert re.search(message, capsys.readouterr().err)


def test_chat_templates_go_along_and_other_folders_are_named(small_hub, saved, capsys):
    for name in ("additional_chat_templates/tool.jinja", "checkpoint-3/model.safetensors"):
        (saved / name).parent.mkdir()
        (saved / name).write_text("text")
    (saved / "chat.tmpl").write_text("text")  # no unfinished file
    assert push(saved, REPO) == 0
    files = small_hub.repos[REPO]["files"]
    assert files["additional_chat_templates/tool.jinja"] == files["chat.tmpl"] == b"text"
    assert "not sent: checkpoint-3/\n" in capsys.readouterr().out


def test_a_folder_of_chat_templates_may_not_be_a_link(saved, tmp_path, capsys):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "tool.jinja").touch()
    (saved / "additional_chat_templates").symlink_to(tmp_path / "secret")
    assert push(saved, REPO, "--dry-run") == 2
    assert "tool.jinja links to" in capsys.readouterr().err


def test_a_repository_that_exists_gets_a_commit_on_top(small_hub, saved):
    small_hub.create(REPO)["files"]["notes.txt"] = b"kept"
    assert push(saved, REPO) == 0
    assert small_hub.repos[REPO]["files"]["notes.txt"] == b"kept"
    assert "model.safetensors" in small_hub.repos[REPO]["files"]


def test_a_private_repository_is_made_private(small_hub, saved):
    assert push(saved, REPO, "--private") == 0
    assert small_hub.repos[REPO]["private"] is True


def test_nothing_private_goes_into_a_public_repository(small_hub, saved, capsys):
    small_hub.create(REPO)
    assert push(saved, REPO, "--private") == 2
    assert "exists and is public" in capsys.readouterr().err
    assert not small_hub.repos[REPO]["files"] and not small_hub.objects


def test_a_dropped_connection_is_tried_again(small_hub, saved):
    small_hub.faults["drop upload"] = 1
    assert push(saved, REPO) == 0
    assert small_hub.repos[REPO]["files"]["model.safetensors"] == (saved / "model.safetensors").read_bytes()


def test_after_a_lost_connection_the_same_command_goes_on(small_hub, saved, capsys):
    small_hub.faults["drop commit"] = 1000
    assert push(saved, REPO) == 2
    error = capsys.readouterr().err
    assert "the connection was lost" in error and "Run the same command again" in error
    assert len(small_hub.objects) == 1 and not small_hub.repos[REPO]["files"]  # nothing half is published
    small_hub.faults.clear()
    assert push(saved, REPO) == 0
    assert small_hub.requests["upload"] == 1  # what had arrived was not sent again
    assert small_hub.repos[REPO]["commits"] == 1


def test_a_hub_out_of_order_is_said_so(small_hub, saved, capsys):
    small_hub.faults["fail commit"] = 1000
    assert push(saved, REPO) == 2
    assert "the Hub is out of order (500); nothing was published" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("hf_wrong", "the Hub does not accept your token"),
        ("hf_reader", "your token has no right to write to 'me/tiny'"),
    ],
)
def test_a_token_that_will_not_do(small_hub, saved, capsys, monkeypatch, token, message):
    monkeypatch.setenv("HF_TOKEN", token)
    assert push(saved, REPO) == 2
    assert message in capsys.readouterr().err
    assert not small_hub.repos


def test_without_a_token(small_hub, saved, capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    assert push(saved, REPO) == 2
    assert "hf auth login" in capsys.readouterr().err


def test_a_gated_repository(small_hub, saved, capsys, monkeypatch):
    small_hub.create(REPO, gated=True)
    monkeypatch.setenv("HF_TOKEN", "hf_guest")
    assert push(saved, REPO) == 2
    assert "'me/tiny' is gated; ask for access" in capsys.readouterr().err
    assert not small_hub.repos[REPO]["files"] and not small_hub.objects


def test_offline(saved, capsys):
    assert push(saved, REPO) == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err


def test_a_name_without_a_user_is_refused_before_anything_is_made(small_hub, saved, capsys):
    for options in ([], ["--dry-run"]):
        assert push(saved, "tiny", *options) == 2
        assert "'tiny' does not say whose it is; give USER/NAME" in capsys.readouterr().err
    assert not small_hub.repos


@pytest.mark.parametrize("message", ["", " "])
def test_an_empty_message_is_refused_before_anything_is_made(small_hub, saved, capsys, message):
    assert push(saved, REPO, "--message", message) == 2
    assert "--message: it is empty" in capsys.readouterr().err
    assert not small_hub.repos


def test_a_header_that_the_hub_refuses(small_hub, saved, capsys):
    small_hub.faults["bad header"] = 1
    assert push(saved, REPO) == 2
    assert "the Hub refuses the header of README.md: - license is unknown" in capsys.readouterr().err
    assert not small_hub.repos[REPO]["files"]


@pytest.mark.parametrize("repo", ["../up", "a/b/c", "me/..", "me/x y", "", "me/-"])
def test_tricks_in_the_name_of_the_repository(saved, capsys, repo):
    assert push(saved, repo, "--dry-run") == 2
    assert "is not a name for a repository" in capsys.readouterr().err


def test_a_pickle_in_place_of_safetensors(saved, capsys):
    torch.save({}, saved / "model.safetensors")
    assert push(saved, REPO, "--dry-run") == 2
    assert "model.safetensors' is not a complete safetensors file" in capsys.readouterr().err


def test_weights_that_are_cut_off(saved, capsys):
    whole = (saved / "model.safetensors").read_bytes()
    (saved / "model.safetensors").write_bytes(whole[:-5])
    assert push(saved, REPO, "--dry-run") == 2
    assert "is not a complete safetensors file" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_weights_that_are_no_numbers(saved, capsys, value, dtype):
    weights = load_file(saved / "model.safetensors")
    name = sorted(weights)[-1]
    for weight, result in ((torch.full((2, 3), value), 2), (torch.full((2, 3), 1.0), 0), (torch.empty(0), 0)):
        save_file({**weights, name: weight.to(dtype)}, saved / "model.safetensors", {"format": "pt"})
        assert push(saved, REPO, "--dry-run") == result
        error = capsys.readouterr().err
        assert (f"{name} in '{saved}/model.safetensors' holds NaN or infinity" in error) == bool(result)


def test_a_shard_that_is_missing(saved, capsys):
    AutoModelForCausalLM.from_pretrained(saved).save_pretrained(saved, max_shard_size=20_000)
    shards = sorted(saved.glob("model-*.safetensors"))
    assert len(shards) > 1
    shards[-1].unlink()
    assert push(saved, REPO, "--dry-run") == 2
    assert f"lacks {shards[-1].name}" in capsys.readouterr().err


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_none(saved, capsys, index):
    (saved / "model.safetensors.index.json").write_text(index)
    assert push(saved, REPO, "--dry-run") == 2
    assert "index.json' does not say which file holds which weights" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["secrets.txt", "config.json", "README.md", "model.safetensors"])
def test_a_link_out_of_the_folder_is_refused(saved, tmp_path, capsys, name):
    outside = tmp_path / "outside"
    (saved / name).touch()
    (saved / name).rename(outside)
    (saved / name).symlink_to(outside)
    assert push(saved, REPO, "--dry-run") == 2
    assert f"{name} links to {str(outside)!r}, outside of the folder" in capsys.readouterr().err


def test_links_that_stay_in_the_folder_are_followed(small_hub, saved):
    (saved / "vocabulary.json").symlink_to(saved / "tokenizer.json")
    (saved.parent / "link").symlink_to(saved)
    assert push(saved.parent / "link", REPO) == 0
    assert small_hub.repos[REPO]["files"]["vocabulary.json"] == (saved / "tokenizer.json").read_bytes()


def test_links_that_stay_behind_do_no_harm(saved, tmp_path, capsys):
    (tmp_path / "outside").touch()
    (saved / ".hidden").symlink_to(tmp_path / "outside")
    (saved / "gone.txt").symlink_to(tmp_path / "nowhere")
    assert push(saved, REPO, "--dry-run") == 0
    assert "not sent: .hidden, gone.txt" in capsys.readouterr().out


def test_a_folder_in_the_cache_of_the_hub(small_hub, saved, tmp_path):
    """Its files are links to those next to it that have the hash for a name."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "12ab", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(saved.iterdir()):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert push(snapshot, REPO) == 0
    files = small_hub.repos[REPO]["files"]
    assert all(files[path.name] == path.read_bytes() for path in snapshot.iterdir() if path.name != "README.md")


def test_a_folder_without_weights(saved, capsys):
    (saved / "model.safetensors").unlink()
    assert push(saved, REPO, "--dry-run") == 2
    assert "has no weights in safetensors format" in capsys.readouterr().err


def test_a_folder_that_is_not_there(tmp_path, capsys):
    assert push(tmp_path / "nowhere", REPO, "--dry-run") == 2
    assert "nowhere' is not a folder" in capsys.readouterr().err


@pytest.mark.slow
def test_what_was_pushed_is_pulled_elsewhere(small_hub, saved, elsewhere, expected, tokenizer, tmp_path):
    text = "a small text, seen by all"
    model = AutoModelForCausalLM.from_pretrained(saved)
    save_file({"output": expected(model, tokenizer)}, tmp_path / "expected")
    assert push(saved, REPO) == 0
    environment = {"HF_ENDPOINT": small_hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    assert elsewhere(PULL, REPO, text, tmp_path / "expected", **environment).split()[-1] == "True"
    assert load_file(tmp_path / "expected")["output"].isfinite().all()
