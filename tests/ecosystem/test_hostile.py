"""What may come from strangers: checkpoints, configs, recipes, names. Each attack ends early, in a clear error."""

import json
import multiprocessing
import os
import pickle
import resource
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_holo import HoloError, HoloSurgeryConfig, apply_surgery, architectures, cli
from hf_holo.conversion.distill.arguments import parse as parse_distillation
from hf_holo.data.tokenizers import character_tokenizer
from hf_holo.modeling import checkpoint as checkpoint_module
from hf_holo.training.arguments import parse
from hf_holo.training.train import main as train

WEIGHTS = "model.safetensors"
ABSURD = 10**12
ALLOWED = 512 * 2**20  # bytes on top of what the process holds: far more than a tiny model needs
HOSTILE = partial(pytest.mark.feature, "hostile input")
DAMAGED_WEIGHTS = HOSTILE("damaged weights are refused")
ABSURD_SIZES = HOSTILE("absurd sizes are refused before memory is taken")


@pytest.fixture
def checkpoint(tiny, family, tmp_path) -> Path:
    """A checkpoint of every family, and its tokenizer."""
    folder = tmp_path / family
    tokenizer = character_tokenizer(["a text"])
    tokenizer.save_pretrained(folder)
    tiny(family, vocab_size=len(tokenizer)).save_pretrained(folder)
    return folder


@pytest.fixture
def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=61, **sizes))


@pytest.fixture
def converted(llama, tmp_path) -> Path:
    """A checkpoint of a model of transformers with holographic layers."""
    apply_surgery(llama, HoloSurgeryConfig(harmonics=8))
    llama.save_pretrained(tmp_path / "converted")
    return tmp_path / "converted"


@pytest.fixture
def bomb(tmp_path) -> "Bomb":
    return Bomb(tmp_path / "went off")


class Bomb:
    """An object whose pickle makes a file when it is read, and a module that does so when it is imported."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)

    @property
    def code(self) -> str:
        return f"open({str(self.trace)!r}, 'w')\nclass Evil: pass\n"

    @property
    def went_off(self) -> bool:
        return self.trace.exists()


def load(folder: Path, **options):
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def change_config(folder: Path, **values) -> dict:
    """Change values in config.json; what it was."""
    before = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**before, **values}))
    return before


def change_weight(folder: Path, change) -> str:
    """Put `change(weight)` in the place of the last matrix; its name."""
    weights = load_file(folder / WEIGHTS)
    name = [name for name, weight in weights.items() if weight.dim() == 2][-1]
    weights[name] = change(weights[name]).contiguous()
    save_file(weights, folder / WEIGHTS, {"format": "pt"})
    return name


# Weights ------------------------------------------------------------------------------------------------------------


@DAMAGED_WEIGHTS
@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_named(checkpoint, share):
    content = (checkpoint / WEIGHTS).read_bytes()
    (checkpoint / WEIGHTS).write_bytes(content[: int(share * len(content))])
    with pytest.raises(OSError, match=rf"{checkpoint.name}: its weights are not a complete safetensors file"):
        load(checkpoint)


@DAMAGED_WEIGHTS
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_shard_may_be_damaged(checkpoint, damage):
    model = load(checkpoint)
    (checkpoint / WEIGHTS).unlink()
    model.save_pretrained(checkpoint, max_shard_size="20KB")
    shard = sorted(checkpoint.glob("*.safetensors"))[1]
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(OSError, match="complete safetensors file" if damage == "truncated" else shard.name):
        load(checkpoint)


@DAMAGED_WEIGHTS
def test_wrong_shapes_are_refused(checkpoint):
    change_weight(checkpoint, lambda weight: weight[:-1])
    with pytest.raises(RuntimeError, match=f"{checkpoint.name}: its weights have other shapes than its config says"):
        load(checkpoint)


@DAMAGED_WEIGHTS
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_named(checkpoint, value):
    def damaged(weight: torch.Tensor) -> torch.Tensor:
        weight[-1, -1] = value
        return weight

    name = change_weight(checkpoint, damaged)
    with pytest.raises(ValueError, match=f"{checkpoint.name}: {name} of .* hold NaN or infinity"):
        load(checkpoint)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_large_numbers_are_numbers(checkpoint, dtype):
    largest = torch.finfo(dtype).max
    name = change_weight(checkpoint, lambda weight: torch.full_like(weight, largest))
    assert (load(checkpoint, dtype=dtype).state_dict()[name] == largest).all()


def test_a_converted_model_is_looked_at_too(converted):
    weights = load_file(converted / WEIGHTS)
    next(weight for name, weight in weights.items() if name.endswith("amplitude"))[0, 0] = torch.nan
    save_file(weights, converted / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        load(converted)


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_truncated_file_of_a_converted_model_is_named(converted, share, sharded):
    if sharded:
        model = load(converted)
        (converted / WEIGHTS).unlink()
        model.save_pretrained(converted, max_shard_size="10KB")
    file = sorted(converted.glob("*.safetensors"))[-1]
    assert load(converted) is not None and (file.name != WEIGHTS) == sharded
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(OSError, match=rf"{file.name}: its weights are not a complete safetensors file"):
        load(converted)


@HOSTILE("a pickle is refused and never run")
def test_a_pickle_is_refused_and_never_run(checkpoint, bomb):
    (checkpoint / WEIGHTS).rename(checkpoint / "kept")
    with (checkpoint / WEIGHTS).open("wb") as file:
        pickle.dump(bomb, file)
    with pytest.raises(OSError, match="not a complete safetensors file"):
        load(checkpoint)
    (checkpoint / WEIGHTS).unlink()
    for content in ({"bomb": bomb}, load_file(checkpoint / "kept")):
        torch.save(content, checkpoint / "pytorch_model.bin")
        with pytest.raises(OSError, match=rf"no file named {WEIGHTS}"):
            load(checkpoint)
    assert load(checkpoint, use_safetensors=False) is not None  # whoever asks for it gets it: the values, no code
    torch.save({"bomb": bomb}, checkpoint / "pytorch_model.bin")
    with pytest.raises((OSError, pickle.UnpicklingError)):
        load(checkpoint, use_safetensors=False)
    assert not bomb.went_off


@pytest.fixture
def resumable(tmp_path) -> tuple[list[str], Path]:
    """The arguments of a short run, and a checkpoint in the middle of it."""
    (tmp_path / "text.txt").write_text("a text " * 200)
    flags = f"--train_file {tmp_path}/text.txt --output_dir {tmp_path}/run --model hidden_size=16 num_hidden_layers=1 "
    flags += "--block_size 16 --stride 16 --max_steps 2 --save_steps 1 --eval_steps 2 --sample_tokens 2 --use_cpu "
    flags += "--disable_tqdm true --causality_check false"
    train(flags.split())
    return flags.split(), tmp_path / "run" / "checkpoint-1"


def check_refused(flags: list[str], checkpoint: Path, said: str) -> None:
    """Resuming ends in one line that names the checkpoint."""
    with pytest.raises(HoloError, match=said) as error:
        train([*flags, "--resume_from_checkpoint", str(checkpoint)])
    assert "\n" not in str(error.value) and str(checkpoint) in str(error.value)


@HOSTILE("resuming runs no code", family="hsn")
def test_a_checkpoint_to_resume_from_runs_no_code(resumable, bomb):
    flags, checkpoint = resumable
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        kept = (checkpoint / name).read_bytes()
        torch.save({"bomb": bomb}, checkpoint / name)
        check_refused(flags, checkpoint, rf"{name} of .* UnpicklingError")
        (checkpoint / name).write_bytes(kept)
    torch.save({"bomb": bomb}, checkpoint / "training_args.bin")  # is not read at all
    train([*flags, "--resume_from_checkpoint", str(checkpoint)])
    assert not bomb.went_off


@HOSTILE("a damaged checkpoint to resume from is refused", family="hsn")
def test_a_damaged_file_of_a_checkpoint_to_resume_from_is_named(resumable):
    flags, checkpoint = resumable
    files = [path for path in checkpoint.iterdir() if path.suffix in (".json", ".safetensors", ".pt", ".pth")]
    assert len(files) >= 7
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        unnamed = "no tokenizer, or a damaged one|is not a complete checkpoint"
        check_refused(flags, checkpoint, unnamed if file.name.startswith(("token", "trainer_s")) else file.name)
        file.write_bytes(content)


@HOSTILE("a damaged checkpoint to resume from is refused", family="hsn")
def test_what_belongs_to_another_run_is_refused(resumable):
    flags, checkpoint = resumable
    check_refused(
        [*flags, "--model", "hidden_size=32", "num_hidden_layers=1"], checkpoint, "the weights of .* mismatch"
    )
    wrong = {
        "optimizer.pt": ({"state": {}, "param_groups": []}, "optimizer.pt or scheduler.pt"),
        "rng_state.pth": ({}, "random state"),
        "trainer_state.json": ({"global_step": 1}, "trainer_state.json"),
    }
    for name, (value, said) in wrong.items():
        kept = (checkpoint / name).read_bytes()
        torch.save(value, checkpoint / name) if "json" not in name else (checkpoint / name).write_text(
            json.dumps(value)
        )
        check_refused(flags, checkpoint, said)
        (checkpoint / name).write_bytes(kept)
    (checkpoint / "trainer_state.json").write_text("[]")
    check_refused(flags, checkpoint, "is not a complete checkpoint")


@HOSTILE("a damaged checkpoint to resume from is refused", family="hsn")
def test_weights_to_resume_from_are_numbers(resumable):
    flags, checkpoint = resumable
    change_weight(checkpoint, lambda weight: torch.full_like(weight, torch.nan))
    check_refused(flags, checkpoint, "the weights of .* hold NaN or infinity")


# Configs ------------------------------------------------------------------------------------------------------------


@ABSURD_SIZES
def test_absurd_sizes_are_refused_before_memory_is_taken(checkpoint):
    """Every whole number in config.json is made absurd, one at a time, in a process that may take little memory. What
    is not a size (the id of a token) may load."""
    original = json.loads((checkpoint / "config.json").read_text())
    numbers = [name for name, value in original.items() if isinstance(value, int) and not isinstance(value, bool)]
    assert {"hidden_size", "vocab_size", "num_hidden_layers"} <= set(numbers)
    outcomes = in_a_small_process(load_with, checkpoint, [*numbers, "num_labels"])
    sizes = {name for name in numbers if name.startswith(("num_", "hidden", "intermediate", "vocab", "rank", "gate_t"))}
    assert {outcomes.pop(name) for name in ({"num_labels"} | sizes) & outcomes.keys()} == {"ValueError"}
    assert set(outcomes.values()) <= {"loaded", "ValueError", "RuntimeError: shapes"}


@ABSURD_SIZES
@pytest.mark.parametrize("name", ["hidden_size", "vocab_size"])
def test_sizes_beyond_the_file_are_refused_before_memory_is_taken(checkpoint, name):
    """Sizes that a model could have, but not one with these weights."""
    value = {"hidden_size": 2**15, "vocab_size": 2**28}[name]
    (outcome,) = in_a_small_process(load_with, checkpoint, [name], value).values()
    assert outcome in ("ValueError", "RuntimeError: shapes")


@HOSTILE("absurd sizes are refused before memory is taken", family="hsn")
def test_a_new_model_beyond_the_memory_is_refused(tmp_path):
    """Sizes that a model could have, with some ten times the memory in weights."""
    (tmp_path / "text.txt").write_text("a text " * 200)
    flags = ["--train_file", f"{tmp_path}/text.txt", "--output_dir", f"{tmp_path}/run", "--use_cpu"]
    message = in_a_small_process(refusal, [*flags, "--model", "hidden_size=8192", "num_hidden_layers=3"])
    assert "hidden_size=8192, num_hidden_layers=3: the weights" in message and "this machine has" in message
    assert not (tmp_path / "run").exists()


def refusal(flags: list[str]) -> str:
    """What `hf-holo train` says to these arguments."""
    try:
        train(flags)
    except HoloError as error:
        return str(error)
    return "trained"


def load_with(folder: Path, names: list[str], value: int = ABSURD) -> dict[str, str]:
    """How loading ends with each of these config values in turn."""
    outcomes = {}
    for name in names:
        before = change_config(folder, **{name: value})
        try:
            load(folder)
            outcomes[name] = "loaded"
        except RuntimeError as error:
            outcomes[name] = "RuntimeError: " + (
                "shapes" if "other shapes than its config" in str(error) else str(error)
            )
        except Exception as error:  # the test says which it may be
            outcomes[name] = type(error).__name__
        (folder / "config.json").write_text(json.dumps(before))
    return outcomes


def in_a_small_process(function, *arguments, seconds: int = 120):
    """What the function returns in a process that may take `ALLOWED` bytes and this many seconds."""

    def run(sender) -> None:
        torch.set_num_threads(1)
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        checkpoint_module.physical_memory = lambda: ALLOWED
        resource.setrlimit(resource.RLIMIT_AS, (held + ALLOWED,) * 2)
        sender.send(function(*arguments))

    context = multiprocessing.get_context("fork")  # everything is imported already
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(sender,))
    process.start()
    sender.close()
    try:
        assert receiver.poll(seconds), "it takes too long"
        return receiver.recv()
    finally:
        process.kill()
        process.join()


@HOSTILE("config values of the wrong kind are refused")
@pytest.mark.parametrize("value", ["32", 3.5, [], {}, True, -1, None])
@pytest.mark.parametrize("name", ["hidden_size", "vocab_size", "num_hidden_layers", "hidden_dropout_prob"])
def test_values_of_the_wrong_kind_are_named(family, name, value):
    config = architectures()[family].config
    with pytest.raises(ValueError, match=name):
        config(**{name: value})


PLAN = {"harmonics": 8, "basis": "random", "folded": False, "pivoted": False, "lender": None}
QUERIES = "model.layers.0.self_attn.q_proj"
PLANS = {
    "no plan": ([], "a plan gives"),
    "no entry": ({QUERIES: 3}, "a plan gives"),
    "half an entry": ({QUERIES: {"harmonics": 3}}, "a plan gives"),
    "a path for a name": ({"../../etc/passwd": PLAN}, "has no linear layer"),
    "code for a name": ({"__class__": PLAN}, "has no linear layer"),
    "a path for a basis": ({QUERIES: {**PLAN, "basis": "../../basis.npy"}}, "basis"),
    "absurd harmonics": ({QUERIES: {**PLAN, "harmonics": ABSURD}}, "harmonics"),
    "a lender that is not there": ({QUERIES: {**PLAN, "lender": "../../x"}}, "not a layer of the plan that lends"),
}


@pytest.mark.parametrize("case", PLANS)
def test_a_converted_checkpoint_with_a_bad_plan_is_refused(case, llama, tmp_path):
    plan, message = PLANS[case]
    llama.save_pretrained(tmp_path)
    change_config(tmp_path, quantization_config={"quant_method": "holo", "layers": plan})
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


# Code ---------------------------------------------------------------------------------------------------------------


@HOSTILE("an auto_map runs nothing that is not trusted")
@pytest.mark.parametrize("place", ["evil", "../evil", "{outside}", "somebody/evil--evil"])
def test_an_auto_map_runs_nothing_that_is_not_trusted(checkpoint, bomb, tmp_path, place):
    for folder in (checkpoint, tmp_path):
        (folder / "evil.py").write_text(bomb.code)
    reference = place.format(outside=tmp_path / "evil") + ".Evil"
    everything = dict.fromkeys(["AutoConfig", "AutoModelForCausalLM"], reference)
    change_config(checkpoint, auto_map=everything)
    tokenizer_config = checkpoint / "tokenizer_config.json"
    values = json.loads(tokenizer_config.read_text())
    tokenizer_config.write_text(json.dumps({**values, "auto_map": {"AutoTokenizer": [reference, reference]}}))
    assert type(load(checkpoint)).__module__.startswith("hf_holo.")
    assert type(AutoTokenizer.from_pretrained(checkpoint)).__module__.startswith("hf_holo.")
    change_config(checkpoint, model_type="unknown-family")
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoConfig.from_pretrained(checkpoint, trust_remote_code=False)
    with pytest.raises(ValueError, match="trust_remote_code"):
        load(checkpoint, trust_remote_code=False)
    assert not bomb.went_off


# Recipes and names --------------------------------------------------------------------------------------------------

RECIPES = {
    "output_dir: ../../x": "'output_dir', which is for the command line alone",
    "output_dir: /tmp/x": "'output_dir', which is for the command line alone",
    "overwrite: true": "'overwrite', which is for the command line alone",
    "resume_from_checkpoint: ../x/checkpoint-1": "'resume_from_checkpoint', which is for the command line alone",
    "push_to_hub: true": "'push_to_hub', which is for the command line alone",
    "trackio_space_id: somebody/else": "'trackio_space_id', which is for the command line alone",
    "hub_model_id: somebody/else": "'hub_model_id', which is for the command line alone",
    "max_steps: [1, 2]": "'max_steps' to .* a single value",
    "train_file: {a: 1}": "'train_file' to .* a single value",
    "max_steps: 2.5": "max_steps.*invalid int value",
    "task: everything": "task.*invalid choice",
    "preset: ../../../etc/passwd": "unknown preset",
    "{preset: hsn-tiny, dataset_name: python-help, model: {hidden_size: 1000000000000}}": "hidden_size=1000000000000",
    "{preset: hsn-tiny, dataset_name: python-help, model: {__class__: int}}": "__class__",
    "preset: !!python/object/apply:os.system ['touch {trace}']": "not valid YAML",
    "a: &a [x]\nb: &b [*a, *a, *a]\nc: [*b, *b, *b]": "unknown argument",
}


@HOSTILE("path tricks and code in a recipe are refused", family="hsn")
@pytest.mark.parametrize("content", RECIPES)
def test_a_recipe_cannot_say_everything(content, tmp_path, monkeypatch, bomb):
    monkeypatch.chdir(tmp_path)
    Path("bad.yaml").write_text(content.replace("{trace}", str(bomb.trace)))
    with pytest.raises(HoloError, match=RECIPES[content]) as error:
        train(["--recipe", "bad.yaml", "--use_cpu"])
    assert "\n" not in str(error.value)
    assert os.listdir() == ["bad.yaml"] and not bomb.went_off


@pytest.mark.parametrize("name", ["../../../../etc/passwd", "/etc/passwd", "../recipes/quickstart", "quickstart\0"])
def test_the_name_of_a_recipe_is_no_path_into_the_package(name):
    with pytest.raises(HoloError, match="recipe: "):
        parse(["--recipe", name])


def test_a_token_for_the_hub_is_not_written_down(tmp_path):
    """The recipe of a run is saved next to its model, and is pushed with it."""
    secret = ["--push_to_hub", "--hub_token", "hf_secret", "--hub_model_id", "me/it"]
    recipe = {"teacher": "t", "student": "s", "train_file": ["x"], "stages": [{"match": "logits"}]}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    for run in (parse(secret), parse_distillation([str(tmp_path / "recipe.yaml"), *secret])):
        assert run.training.hub_token == "hf_secret"
        assert not {"push_to_hub", "hub_token", "hub_model_id"} & run.recipe.keys() and "secret" not in str(run.recipe)


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "..", "a/b", ""])
def test_the_name_of_a_stage_is_a_plain_name(name, tmp_path):
    recipe = {"teacher": "t", "student": "s", "train_file": ["x"], "stages": [{"match": "logits", "name": name}]}
    (tmp_path / "bad.yaml").write_text(json.dumps(recipe))
    with pytest.raises(HoloError, match="stages: "):
        parse_distillation([str(tmp_path / "bad.yaml")])


@HOSTILE("path tricks in the name of a repository are refused")
@pytest.mark.parametrize("name", ["../../x", "../x", "/tmp/x", "a/b/c", "a/..", "a/b--c", "https://a.b/c", ""])
def test_the_name_of_a_repository_is_no_path(checkpoint, name, capsys):
    before = sorted(path.name for path in checkpoint.iterdir())
    assert cli.main(["push", str(checkpoint), name, "--dry-run"]) == 2
    assert "is not a name for a repository" in capsys.readouterr().err
    assert sorted(path.name for path in checkpoint.iterdir()) == before


@pytest.mark.parametrize("name", ["../../etc/passwd", "a/b/c", "/etc"])
def test_a_model_that_is_a_path_to_something_else_is_refused(name, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("a text " * 200)
    flags = ["--model_name_or_path", name, "--train_file", f"{tmp_path}/text.txt", "--output_dir", f"{tmp_path}/run"]
    assert cli.main(["train", *flags]) == 2
    assert "model_name_or_path" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@HOSTILE("the commands say it in one line")
@pytest.mark.parametrize("damage", ["truncated", "shapes", "nan", "half a tokenizer", "no tokenizer"])
def test_the_commands_say_it_in_one_line(checkpoint, damage, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("a text " * 200)
    if damage == "truncated":
        (checkpoint / WEIGHTS).write_bytes((checkpoint / WEIGHTS).read_bytes()[:-1])
    elif damage == "half a tokenizer":
        (checkpoint / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes()[:100])
    elif damage == "no tokenizer":
        for path in [*checkpoint.glob("*token*.json")]:
            path.unlink()
    else:
        change_weight(checkpoint, lambda w: w[:-1] if damage == "shapes" else torch.full_like(w, torch.nan))
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    source = ["--model_name_or_path", str(checkpoint), "--train_file", f"{tmp_path}/text.txt"]
    for command in (
        ["train", *source, "--output_dir", f"{tmp_path}/run"],
        ["generate", str(checkpoint), "--prompt", "a"],
    ):
        assert cli.main(command) == 2
        message = capsys.readouterr().err.strip().split("hf-holo: error: ")[1]
        assert "\n" not in message and str(checkpoint) in message
