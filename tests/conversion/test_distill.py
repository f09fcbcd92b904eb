"""`hf-holo distill` on tiny models: stages that lower their loss, a teacher that stays, and runs that are resumed."""

import csv
import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from small_distillations import (
    QUICK,
    SHAPE,
    TEXT,
    TOKENIZER,
    arguments,
    make_student,
    make_teacher,
    write_models,
)
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_holo.conversion.distill.arguments import PREFIX, DistillTrainingArguments, Stage, StageArguments, parse
from hf_holo.conversion.distill.command import choose_trainable, distill, feature_grams, main, mixed_equally
from hf_holo.conversion.distill.objectives import (
    SoftLabels,
    block_twins,
    converted_layers,
    hidden_state_loss,
    logit_loss,
    output_loss,
)
from hf_holo.conversion.surgery.apply import apply_surgery
from hf_holo.conversion.surgery.plan import HoloSurgeryConfig
from hf_holo.conversion.surgery.transfer import transfer_to_hsn
from hf_holo.data.tokenizers import make_tokenizer
from hf_holo.errors import HoloError
from hf_holo.recipes import recipe_names


@pytest.fixture(params=[pytest.param("hsn", marks=pytest.mark.slow), "surgery"])
def folders(request, tmp_path):
    return write_models(request.param, tmp_path)


@pytest.fixture
def hsn_folders(tmp_path):
    return write_models("hsn", tmp_path)


ALL = [{"match": "layers"}, {"match": "blocks"}, {"match": "hidden_states"}, {"match": "logits", "temperature": 2.0}]


def test_a_run_writes_all_it_promises_and_leaves_the_teacher(folders, capsys):
    before = {path.name: path.read_bytes() for path in (folders / "teacher").iterdir()}
    main(arguments(folders, ALL, eval_windows=3))
    out = folders / "out"
    report = json.loads((out / "report.json").read_text())
    assert [stage["name"] for stage in report["stages"]] == ["layers", "blocks", "hidden_states", "logits"]
    for entry in (report["teacher"], report["student"], *report["stages"]):
        assert entry["scores"]["text"]["perplexity"] > 1
    assert all(stage["steps"] == 4 and stage["seconds"] > 0 for stage in report["stages"])
    assert report["stages"][0]["tokens"] == 4 * 4 * 16
    rows = list(csv.DictReader((out / "losses.csv").open()))
    assert [row["stage"] for row in rows if row["stage_loss"]] == [s["match"] for s in ALL for _ in range(4)]
    assert (out / "losses.png").read_bytes().startswith(b"\x89PNG")
    last = AutoModelForCausalLM.from_pretrained(out / "4-logits").state_dict()
    for name, value in AutoModelForCausalLM.from_pretrained(out).state_dict().items():
        assert torch.equal(value, last[name]), name
    assert before == {path.name: path.read_bytes() for path in (folders / "teacher").iterdir()}
    assert "perplexity ratio" in capsys.readouterr().out
    card = (out / "README.md").read_text()
    assert "Trained on `text.txt`" in card and 'AutoModelForCausalLM.from_pretrained("out"' in card


@pytest.mark.parametrize(
    ("surgery", "changes", "trains"),
    [
        pytest.param({"folded": True}, {}, {"coefficients", "bias"}, marks=pytest.mark.slow),
        pytest.param({}, {}, {"amplitude", "phase", "bias"}, marks=pytest.mark.slow),
        ({"folded": True}, {"lora_rank": 2}, None),  # what is saved is the adapter
    ],
)
def test_the_recipe_of_surgery_teaches_every_student(tmp_path, surgery, changes, trains):
    """Of fitted layers, of those with regenerated bases or biases, and through adapters."""
    teacher = LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), attention_bias=True, **SHAPE)).eval()
    teacher.save_pretrained(tmp_path / "teacher")
    TOKENIZER.save_pretrained(tmp_path / "teacher")
    apply_surgery(teacher, HoloSurgeryConfig(harmonics=6, **surgery))
    teacher.save_pretrained(tmp_path / "student")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    flags = {**QUICK, "max_steps": 20, "learning_rate": 5e-3, **changes}
    places = {name: tmp_path / name for name in ("teacher", "student")} | {"train_file": tmp_path / "text.txt"}
    words = [f"--{name}={value}" for name, value in (places | flags).items()]
    main(["distill-surgery", *words, "--output_dir", str(tmp_path / "out")])
    rows = list(csv.DictReader((tmp_path / "out" / "losses.csv").open()))
    losses = [float(row["stage_loss"]) for row in rows if row["stage_loss"]]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    if trains:
        before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("student", "out"))
        assert {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])} == trains


@pytest.mark.parametrize("kind", ["hsn", pytest.param("surgery", marks=pytest.mark.slow)])
@pytest.mark.parametrize("match", ["layers", "blocks", "hidden_states", "logits"])
def test_every_stage_lowers_its_own_loss(kind, match):
    teacher = make_teacher(kind).requires_grad_(False)
    student = make_student(kind, teacher)
    twins = {"layers": list(converted_layers(student, teacher).values()), "blocks": block_twins(student, teacher)}
    loss = {
        "layers": lambda: output_loss(teacher, twins["layers"], residual=False),
        "blocks": lambda: output_loss(teacher, twins["blocks"], residual=True),
        "hidden_states": lambda: hidden_state_loss(teacher, twins["blocks"]),
        "logits": lambda: logit_loss(teacher, temperature=2.0, hard_labels=0.0),
    }[match]()
    stage = Stage("it", StageArguments(match=match), None)
    assert choose_trainable(student, teacher, stage, 0) > 0
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=0.01)
    batch = {"input_ids": torch.randint(len(TOKENIZER), (4, 16))}
    losses = []
    for _ in range(40):
        losses.append(loss(student, batch))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


def test_features_are_measured_where_coefficients_read_them():
    teacher = make_teacher("surgery")
    student = make_student("surgery", teacher).requires_grad_(False)
    layer = student.model.layers[0].self_attn.q_proj
    layer.coefficients.requires_grad_(True)
    windows = torch.randint(len(TOKENIZER), (3, 16))
    grams = feature_grams(student, windows)
    with torch.no_grad():
        embedded = student.model.layers[0].input_layernorm(student.model.embed_tokens(windows))
        z = layer.basis(embedded).flatten(0, 1).double()
    torch.testing.assert_close(grams[layer.coefficients], z.T @ z / len(z), rtol=1e-5, atol=1e-6)
    assert len(grams) == 1


def test_the_text_that_is_shorter_repeats_until_all_have_the_same_share():
    mixed = mixed_equally([["a", "b", "c"], ["A", "B"]])
    assert [mixed[i] for i in range(len(mixed))] == ["a", "b", "c", "A", "B", "A"]


def test_a_layer_alone_is_compared_on_the_input_that_the_teacher_had():
    teacher = make_teacher("surgery").requires_grad_(False)
    student = make_student("surgery", teacher)
    twins = list(converted_layers(student, teacher).values())
    batch = {"input_ids": torch.randint(len(TOKENIZER), (2, 16))}
    before = output_loss(teacher, twins, residual=False)(student, batch)
    with torch.no_grad():
        student.model.embed_tokens.weight.normal_()  # nothing that the first layer reads comes from the student
    assert torch.equal(output_loss(teacher, twins, residual=False)(student, batch), before)


def test_a_perfect_student_has_no_loss():
    teacher = make_teacher("hsn").requires_grad_(False)
    student, batch = transfer_to_hsn(teacher, layers=[]), {"input_ids": torch.randint(len(TOKENIZER), (2, 16))}
    twins = block_twins(student, teacher)
    for loss in (output_loss(teacher, twins, True), hidden_state_loss(teacher, twins), logit_loss(teacher, 2.0, 0.0)):
        assert loss(student, batch).item() == pytest.approx(0, abs=1e-5)


def test_cached_logits_of_the_whole_vocabulary_give_the_gradients_of_live_ones():
    wanted, logits = torch.randn(2, 5, 11), torch.randn(2, 5, 11, requires_grad=True)
    (live,) = torch.autograd.grad(SoftLabels.of(wanted, 2.0).divergence(logits, 2.0).mean(), logits)
    (cached,) = torch.autograd.grad(SoftLabels.of(wanted, 2.0, 11).divergence(logits, 2.0).mean(), logits)
    torch.testing.assert_close(cached, live)


def test_the_divergence_is_that_of_torch_and_a_part_of_the_tokens_bounds_it_from_below():
    wanted, logits = torch.randn(2, 5, 11), torch.randn(2, 5, 11)
    log_probs = [torch.log_softmax(x / 2, -1).flatten(0, 1) for x in (logits, wanted)]
    exact = 4 * torch.nn.functional.kl_div(*log_probs, log_target=True, reduction="batchmean")
    assert SoftLabels.of(wanted, 2.0).divergence(logits, 2.0).mean() == pytest.approx(exact.item(), rel=1e-5)
    some = [SoftLabels.of(wanted, 2.0, k).divergence(logits, 2.0).mean().item() for k in (1, 4, 10)]
    assert 0 < some[0] < some[1] < some[2] <= exact.item() + 1e-6


@pytest.mark.slow
def test_a_cached_run_ends_where_a_live_one_does(hsn_folders):
    stage = [{"match": "logits", "temperature": 2.0}]
    live = distill(parse(arguments(hsn_folders, stage, out="live"))).state_dict()
    cached = distill(parse(arguments(hsn_folders, stage, out="cached", cache_logits=1000))).state_dict()
    assert (hsn_folders / "cached/1-logits/teacher_logits.safetensors").is_file()
    for name, value in live.items():
        torch.testing.assert_close(cached[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind, optimizer", [("hsn", "adamw"), ("surgery", "whitened")])
def test_an_interrupted_run_goes_on_and_ends_where_an_uninterrupted_one_does(kind, optimizer, tmp_path):
    folders = write_models(kind, tmp_path)
    stages = [{"match": "layers"}, {"match": "logits", "optimizer": optimizer}]
    distill(parse(arguments(folders, stages, out="whole")))
    whole, cut = folders / "whole", folders / "cut"
    shutil.copytree(whole, cut)
    for name in ("2-logits/stage.json", "2-logits/model.safetensors", "model.safetensors"):
        (cut / name).unlink()
    shutil.rmtree(cut / "2-logits/checkpoint-4")
    with pytest.raises(HoloError, match="already holds a run"):
        main(arguments(folders, stages, out="cut"))
    distill(parse(arguments(folders, stages, "--resume_from_checkpoint", out="cut")))
    report = json.loads((cut / "report.json").read_text())
    assert [(stage["name"], stage["resumed"]) for stage in report["stages"]] == [("layers", False), ("logits", True)]
    expected = load_file(whole / "model.safetensors")
    for name, value in load_file(cut / "model.safetensors").items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.slow
def test_a_later_stage_can_be_done_again_alone(hsn_folders):
    stages = [{"match": "layers"}, {"match": "logits"}]
    with pytest.raises(HoloError, match="needs the stage 'layers'"):
        main(arguments(hsn_folders, stages, "--start_stage", "logits"))
    with pytest.raises(HoloError, match="not one of the stages layers, logits"):
        main(arguments(hsn_folders, stages, "--start_stage", "heads"))
    main(arguments(hsn_folders, stages))
    first = (hsn_folders / "out/1-layers/stage.json").read_bytes()
    main(arguments(hsn_folders, stages, "--start_stage", "logits", "--max_steps", "2"))
    assert (hsn_folders / "out/1-layers/stage.json").read_bytes() == first
    report = json.loads((hsn_folders / "out/report.json").read_text())
    assert [stage["steps"] for stage in report["stages"]] == [4, 2]


def test_adapters_train_alone_through_all_stages(folders):
    student = distill(parse(arguments(folders, [{"match": "layers"}, {"match": "logits"}], lora_rank=2)))
    assert all("lora_" in name for name, p in student.named_parameters() if p.requires_grad)
    original = AutoModelForCausalLM.from_pretrained(folders / "student").state_dict()
    for name, value in student.get_base_model().state_dict().items():
        if name in original:
            assert torch.equal(value, original[name]), name
    assert any(value.abs().sum() > 0 for name, value in student.named_parameters() if "lora_B" in name)
    assert (folders / "out/adapter_model.safetensors").is_file()


def test_only_what_is_named_trains(hsn_folders):
    before = load_file(hsn_folders / "student/model.safetensors")
    distill(parse(arguments(hsn_folders, [{"match": "logits", "trainable": r"layers\.1\.mixer\.out_proj"}])))
    after = load_file(hsn_folders / "out/model.safetensors")
    changed = [name for name, value in after.items() if not torch.equal(value, before[name])]
    assert changed == ["model.layers.1.mixer.out_proj.weight"]


@pytest.mark.slow
def test_the_written_recipe_repeats_the_run(hsn_folders):
    main(arguments(hsn_folders, [{"match": "layers", "max_steps": 3}], "--learning_rate", "0.01"))
    out = hsn_folders / "out"
    run = parse([str(out / "recipe.yaml"), "--output_dir", str(hsn_folders / "again")])
    assert run.stages[0].training.max_steps == 3
    assert run.stages[0].training.learning_rate == 0.01
    distill(run)
    expected = load_file(out / "model.safetensors")
    for name, value in load_file(hsn_folders / "again/model.safetensors").items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("name", recipe_names("hf_holo.conversion.distill", PREFIX))
def test_the_recipes_of_the_package_are_valid(name):
    run = parse([name, "--teacher", "a", "--student", "b", "--train_file", "c"])
    assert all(isinstance(stage.training, DistillTrainingArguments) for stage in run.stages)


@pytest.mark.parametrize(
    ("stages", "changes", "said"),
    [
        ([], {}, "no list of stages"),
        ([{"match": "layers"}, {"match": "layers"}], {}, "two are called 'layers'"),
        ([{"match": "words"}], {}, "words"),
        ([{"match": "logits", "temprature": 2}], {}, "did you mean temperature"),
        ([{"match": "logits"}], {"temperature": 0.0}, "temperature: 0.0"),
        ([{"match": "logits"}], {"hard_labels": 2.0}, "hard_labels: 2.0"),
        ([{"match": "logits"}], {"trainable": "["}, "not a regular expression"),
        ([{"match": "logits"}], {"trainable": "nowhere"}, "'nowhere' matches no parameter"),
        ([{"match": "logits"}], {"teacher": None}, "teacher: name the folder"),
        ([{"match": "logits"}], {"student": "nowhere"}, "student: cannot load 'nowhere'"),
        ([{"match": "logits"}], {"train_file": None}, "train_file: name at least one"),
        ([{"match": "logits"}], {"block_size": 100_000}, "fewer than one block"),
        ([{"match": "logits"}], {"validation_fraction": [0.1, 0.2]}, "2 shares for 1 texts"),
        ([{"match": "logits"}], {"lora_rank": 2, "lora_modules": ["nowhere"]}, "lora_modules"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(hsn_folders, stages, changes, said):
    with pytest.raises(HoloError, match=said):
        main(arguments(hsn_folders, stages, **changes))
    assert not (hsn_folders / "out").exists()


@pytest.mark.slow
def test_a_full_disk_is_named_and_the_run_goes_on(hsn_folders, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    stages = [{"match": "layers"}, {"match": "logits"}]
    with monkeypatch.context() as patch, pytest.raises(HoloError, match="output_dir: the disk is full while writing"):
        patch.setattr("hf_holo.conversion.distill.command.save_final", full)
        main(arguments(hsn_folders, stages))
    main(arguments(hsn_folders, stages, "--resume_from_checkpoint"))
    assert (hsn_folders / "out" / "model.safetensors").exists()


def test_a_student_of_another_vocabulary_or_shape_is_refused(hsn_folders):
    stage = [{"match": "blocks"}]
    other = make_tokenizer("characters", [TEXT + "XYZ"])
    other.save_pretrained(hsn_folders / "student")
    with pytest.raises(HoloError, match="another vocabulary"):
        main(arguments(hsn_folders, stage))
    shape = {**SHAPE, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(TOKENIZER), **shape)).save_pretrained(hsn_folders / "shallow")
    LlamaForCausalLM(LlamaConfig(vocab_size=99, **SHAPE)).save_pretrained(hsn_folders / "wordy")
    with pytest.raises(HoloError, match="1 blocks, the teacher 2"):
        main(arguments(hsn_folders, stage, student=str(hsn_folders / "shallow")))
    with pytest.raises(HoloError, match="99 tokens"):
        main(arguments(hsn_folders, stage, student=str(hsn_folders / "wordy")))
    with pytest.raises(HoloError, match="nothing in it was converted"):
        main(arguments(hsn_folders, [{"match": "logits"}], student=str(hsn_folders / "teacher")))
