"""`hf-holo distill RECIPE`: a student learns from its teacher in stages, each of them saved and resumable."""

import json
import math
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import ConcatDataset, Subset
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ...data.scoring import held_out_loss
from ...data.tokenizers import saved_tokenizer
from ...data.windows import AnyWindows, Collator, Splits, evenly
from ...distributed.processes import by_main, count, failing_together, is_main
from ...errors import HoloError
from ...files import write_text
from ...generate import generate_text
from ...hub.card import write_card
from ...hub.code import add_code
from ...modeling.harmonics import HarmonicBasis, HoloLinear
from ...modeling.quantizer import integer_matrices
from ...training.callbacks import CausalityCallback
from ...training.optim import MuonAdamW, WhitenedAdamW
from ...training.progress import show_progress
from ...training.report import folder_of
from ...training.train import find_checkpoint, save_final
from ...training.trainer import HoloTrainer
from ..sources import load_tokenizer, load_weights, splits_of
from ..surgery.calibration import is_expert, removed_after
from ..work_folder import clear_disk_errors
from .arguments import Distillation, DistillTrainingArguments, Stage, TextArguments, parse
from .logit_cache import CachedLogits, write_cache
from .objectives import (
    ROW_WEIGHTS,
    Loss,
    block_twins,
    converted_layers,
    hidden_state_loss,
    logit_loss,
    output_loss,
)
from .report import DistillReport

FEATURE_WINDOWS = 8  # training windows that the features of holographic layers are measured on
FINISHED = "stage.json"  # the last file that a stage writes


def main(argv: list[str]) -> None:
    """Run `hf-holo distill` with these arguments.

    Raises:
        HoloError: bad input; the message is one line that says what to do.
    """
    run = parse(argv)
    folder = folder_of(run.training)
    try:
        with clear_disk_errors("output_dir", folder):
            distill(run)
    except KeyboardInterrupt:
        PartialState().print(f"\nInterrupted. Continue with the same command and --resume_from_checkpoint: {folder}")
        raise SystemExit(130) from None


Student = PreTrainedModel | PeftModel


@dataclass
class Texts:
    """What the student learns on, and what both are scored on.

    Attributes:
        train: windows of all texts.
        validation: held-out windows of each, by the name of its file.
        prompt: text to start a sample from.
    """

    train: AnyWindows
    validation: dict[str, AnyWindows]
    prompt: str


def distill(run: Distillation) -> PreTrainedModel | PeftModel:
    """Distil as `run` says, write everything into its output folder, and return the student."""
    folder = folder_of(run.training)
    with failing_together():
        _check_processes(run)
        finished = _finished_stages(run, folder)
        set_seed(run.training.seed)
        teacher = load_model("teacher", run.models.teacher, run.models.trust_remote_code).eval().requires_grad_(False)
        source = str(stage_folder(run, len(finished) - 1)) if finished else run.models.student
        student = load_student(run, source)
        tokenizer = shared_tokenizer(run)
        check_vocabulary(teacher, student, tokenizer)
        texts = distillation_texts(run.texts, tokenizer)
        for stage in run.stages[len(finished) :]:  # bad input shows before the first stage costs time
            make_loss(stage, student, teacher)
            choose_trainable(student, teacher, stage, run.models.lora_rank)

    by_main(lambda: _prepare(run, folder, finished))
    for model in (teacher, student):
        nn.Module.to(model, run.training.device)
    report = DistillReport.load(folder, len(finished)) if finished else DistillReport(folder)
    if not finished:
        report.teacher = describe(teacher, tokenizer, texts, run)
        report.student = describe(student, tokenizer, texts, run)
        by_main(report.write)
    for stage in run.stages[len(finished) :]:
        entry = run_stage(stage, student, teacher, tokenizer, texts, run)
        report.stages = [*report.stages, entry]
        by_main(report.write)
        PartialState().print(f"\nafter the stage {stage.name!r}: {report.line(entry)}")
    by_main(lambda: _save_result(student, tokenizer, folder))
    PartialState().print(f"\nThe student is saved in {folder}; figures in report.json, losses.csv and losses.png")
    return student


def _save_result(student: Student, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    student.save_pretrained(str(folder))
    if isinstance(student, PreTrainedModel):  # adapters alone have no config.json
        add_code(folder)
        write_card(folder)
    tokenizer.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------- before the first stage
def _check_processes(run: Distillation) -> None:
    """Raise HoloError for options that several processes cannot have."""
    if count() == 1:
        return
    refused = {"torch_compile": run.training.torch_compile, "deepspeed": run.training.deepspeed}
    for name, value in {**refused, "fsdp": run.training.shards}.items():
        if value:
            raise HoloError(f"{name}: does not go together with a distillation in several processes; leave it out")


def stage_folder(run: Distillation, index: int) -> Path:
    return folder_of(run.stages[index].training)


def _finished_stages(run: Distillation, folder: Path) -> list[Stage]:
    """The stages that need not be run, from the first on.

    Raises:
        HoloError: the folder holds a run and nothing says what to do with it; or the stage to start with is unknown, or
            the one before it has not been finished.
    """
    args, names = run.training, [stage.name for stage in run.stages]
    if args.resume_from_checkpoint not in (None, "last"):
        raise HoloError(f"resume_from_checkpoint: {args.resume_from_checkpoint!r}; give it without a value")
    done = [(stage_folder(run, i) / FINISHED).is_file() for i in range(len(names))]
    complete = done.index(False) if False in done else len(done)
    if run.models.start_stage is not None:
        if run.models.start_stage not in names:
            raise HoloError(f"start_stage: {run.models.start_stage!r} is not one of the stages {', '.join(names)}")
        start = names.index(run.models.start_stage)
        if start > complete:
            raise HoloError(
                f"start_stage: {names[start]!r} needs the stage {names[start - 1]!r}, "
                f"which {str(folder)!r} does not hold; run that one first"
            )
        return run.stages[:start]
    if args.resume_from_checkpoint:
        return run.stages[:complete]
    if (folder / "recipe.yaml").exists() and not args.overwrite:
        raise HoloError(
            f"output_dir: {str(folder)!r} already holds a run: continue it with --resume_from_checkpoint, replace it "
            "with --overwrite, or name another --output_dir"
        )
    return []


def _prepare(run: Distillation, folder: Path, finished: list[Stage]) -> None:
    """Remove what the run will replace, and write down its recipe. An interrupted stage keeps its checkpoints."""
    if not run.training.resume_from_checkpoint:
        for index in range(len(finished), len(run.stages)):
            shutil.rmtree(stage_folder(run, index), ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "recipe.yaml", yaml.safe_dump(run.recipe, sort_keys=False))


def load_model(argument: str, source: str | None, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal language model at `source`, in float32.

    Raises:
        HoloError: none is named, or none is there.
    """
    if not source:
        raise HoloError(f"{argument}: name the folder of a causal language model")
    return load_weights(AutoModelForCausalLM, source, torch.float32, argument, trust_remote_code)


def load_student(run: Distillation, source: str | None) -> PreTrainedModel | PeftModel:
    """The student in `source`, with new adapters or those of the last stage, if adapters are what trains."""
    if not run.models.lora_rank:
        student = load_model("student", source, run.models.trust_remote_code)
        if integer_matrices(student):
            raise HoloError(
                f"student: the layers of {source!r} are in small integers and cannot be trained; train it before it is "
                "quantized, or give --lora_rank"
            )
        return student
    student = load_model("student", run.models.student, run.models.trust_remote_code)
    if source is not None and source != run.models.student:
        return PeftModel.from_pretrained(student, source, is_trainable=True)
    rank, modules = run.models.lora_rank, run.models.lora_modules
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear" if modules == ["all-linear"] else modules,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(student, config)
    except ValueError as error:
        raise HoloError(f"lora_modules: {str(error).partition('.')[0]}") from None


def shared_tokenizer(run: Distillation) -> PreTrainedTokenizerBase:
    """The tokenizer of teacher and student.

    Raises:
        HoloError: there is none, or the student brings another.
    """
    teacher, student = cast(str, run.models.teacher), cast(str, run.models.student)  # both have been loaded
    trust = run.models.trust_remote_code
    tokenizer = load_tokenizer(teacher, argument="teacher", trust_remote_code=trust)
    if not (Path(student) / "tokenizer_config.json").is_file():
        return tokenizer  # the student came without one
    other = saved_tokenizer(student, "student", trust_remote_code=trust)
    if other.get_vocab() != tokenizer.get_vocab():
        raise HoloError(
            f"student: the tokenizer in {student!r} has another vocabulary than the teacher's; they must share one"
        )
    return tokenizer


def check_vocabulary(teacher: PreTrainedModel, student: Student, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise HoloError unless both models and the tokenizer speak of the same tokens."""
    sizes = teacher.config.vocab_size, bare_model(student).config.vocab_size
    if sizes[0] != sizes[1]:
        raise HoloError(f"student: its vocabulary has {sizes[1]} tokens, the teacher's {sizes[0]}; they must be equal")
    if len(tokenizer) > sizes[0]:
        raise HoloError(f"teacher: its tokenizer has {len(tokenizer)} tokens, the model only {sizes[0]}")


def distillation_texts(texts: TextArguments, tokenizer: PreTrainedTokenizerBase) -> Texts:
    """Read, split and encode the texts.

    Raises:
        HoloError: a text is missing, or too short for one window.
    """
    splits: dict[str, Splits] = {}
    for file, fraction in zip(texts.train_file, texts.validation_fraction, strict=True):
        name = Path(file).stem
        if name in splits:
            raise HoloError(f"train_file: two texts are called {name!r}; rename one")
        splits[name] = splits_of(file, fraction, tokenizer, texts.block_size, texts.stride, texts.text_column)
    validation = {name: evenly(split.validation, texts.eval_windows) for name, split in splits.items()}
    first = next(iter(splits.values()))
    return Texts(mixed_equally([split.train for split in splits.values()]), validation, first.prompt)


def mixed_equally(texts: list[AnyWindows]) -> AnyWindows:
    """The windows of all texts, those of shorter ones repeated: a student learns from each of them as much."""
    longest = max(map(len, texts))
    return ConcatDataset([Subset(text, [i % len(text) for i in range(longest)]) for text in texts])


def choose_trainable(student: Student, teacher: PreTrainedModel, stage: Stage, lora_rank: int) -> int:
    """Let those parameters learn that the stage names, by default all that conversion made, and no others.

    Returns:
        How many values they hold.

    Raises:
        HoloError: a pattern matches no parameter, or nothing was converted and nothing is named.
    """
    parameters = dict(student.named_parameters())
    if lora_rank:
        chosen = {name for name in parameters if "lora_" in name}
    elif stage.what.trainable:
        chosen = set()
        for pattern in stage.what.trainable:
            matching = {name for name in parameters if re.search(pattern, name)}
            if not matching:
                raise HoloError(f"trainable: {pattern!r} matches no parameter, such as {next(iter(parameters))!r}")
            chosen |= matching
    else:
        layers = tuple(f"{name}." for name in converted_layers(bare_model(student), teacher))
        chosen = {name for name in parameters if name.startswith(layers)}
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in chosen)
    return sum(parameters[name].numel() for name in chosen)


def make_loss(stage: Stage, student: Student, teacher: PreTrainedModel) -> Loss:
    """The loss of a stage, as a function of the student and a batch.

    Raises:
        HoloError: student and teacher cannot be compared in this way.
    """
    bare, what = bare_model(student), stage.what
    if what.match == "layers":
        return output_loss(teacher, list(converted_layers(bare, teacher).values()), residual=False)
    if what.match == "blocks":
        return output_loss(teacher, block_twins(bare, teacher), residual=True)
    if what.match == "hidden_states":
        return hidden_state_loss(teacher, block_twins(bare, teacher))
    return logit_loss(teacher, what.temperature, what.hard_labels)


def bare_model(student: Student) -> PreTrainedModel:
    """The student without what adapters put around it."""
    return cast(PreTrainedModel, student.get_base_model()) if isinstance(student, PeftModel) else student


# ---------------------------------------------------------------------------------------------- a stage
class DistillTrainer(HoloTrainer):
    """[`HoloTrainer`] that trains with the loss of a stage; validation is scored on the text, as ever.

    Several processes learn what one does whose batch is as large as theirs together, up to rounding.

    Args:
        stage_loss: gives the loss of the student on a batch.
    """

    def __init__(self, *args: Any, stage_loss: Loss, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.stage_loss = stage_loss
        self.model_accepts_loss_kwargs = False  # the loss is a mean: accumulated steps have to be averaged

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        if return_outputs:  # Trainer evaluates
            return super().compute_loss(model, inputs, return_outputs)
        student = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():  # for the teacher too, and for parts of the student that are called alone
            if count() == 1:
                return self.stage_loss(bare_model(student), inputs)
            return in_place_of_forward(model, student, lambda: self.stage_loss(bare_model(student), inputs))

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Any]:
        """With weights for the rows of the last batch of an epoch, which Accelerate fills up with the first windows."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        rows = self.args.train_batch_size
        windows: Any = self.train_dataset
        left = len(windows) % (rows * count())  # for the last batch of all processes
        ends = self.accelerator.gradient_state.end_of_dataloader and not self.args.dataloader_drop_last
        if batches and count() > 1 and left and ends:
            place = torch.arange(rows) + rows * self.args.process_index  # in that batch
            weights = (place < left) * (rows * count() / left)
            batches[-1] = {**batches[-1], ROW_WEIGHTS: weights.to(self.args.device)}
        return batches, items


def in_place_of_forward(wrapped: nn.Module, model: nn.Module, function: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Call `function` once where `wrapped` would call the forward of `model`, and return what it returns.

    What is around the model, DistributedDataParallel for one, learns in this way which parameters take part, and
    exchanges their gradients, though parts of the model are called alone.

    Args:
        wrapped: the model in what is around it.
        model: what is inside.
        function: may call the model itself.
    """
    own = vars(model).get("forward")  # of the object: Accelerate puts one there for mixed precision

    def restore() -> None:
        if own is None:
            vars(model).pop("forward", None)
        else:
            vars(model)["forward"] = own

    def once(_: None) -> torch.Tensor:
        restore()
        return function()

    vars(model)["forward"] = once
    try:
        return wrapped(None)  # on GPUs, DistributedDataParallel cannot do without an argument
    finally:
        restore()


def leaves_some_out(loss: Loss, student: Student, batch: dict[str, torch.Tensor]) -> bool:
    """Whether parameters that train may get no gradient from a batch: some get none here, or they belong to experts."""
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    if any(map(is_expert, trained)):
        return True
    batch = {name: value.to(student.device) for name, value in batch.items()}
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        value = loss(bare_model(student), batch)
    return None in torch.autograd.grad(value, list(trained.values()), allow_unused=True)


class DistillCollator(Collator):
    """[`Collator`] that stacks cached soft labels too; windows that have them are of equal length."""

    def __call__(self, examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        cached = [name for name in examples[0] if name.startswith("teacher_")]
        return super().__call__(examples) | {name: torch.stack([e[name] for e in examples]) for name in cached}


def run_stage(
    stage: Stage,
    student: Student,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    run: Distillation,
) -> dict[str, Any]:
    """Train the student in place, save it in the folder of the stage, and return what the report says about it."""
    folder = folder_of(stage.training)
    start = time.perf_counter()
    checkpoint = find_checkpoint(folder, run.training.resume_from_checkpoint)
    trained = choose_trainable(student, teacher, stage, run.models.lora_rank)
    PartialState().print(f"\nstage {stage.name!r}: match {stage.what.match}, {trained:,} parameters train")
    train = texts.train
    if stage.what.match == "logits" and stage.what.cache_logits:
        path, batch = folder / "teacher_logits.safetensors", stage.training.per_device_train_batch_size
        write_cache(teacher, train, path, stage.what.cache_logits, stage.what.temperature, batch)
        train = CachedLogits(train, path)
    trainer = make_trainer(stage, student, make_loss(stage, student, teacher), tokenizer, train, texts)
    config = bare_model(student).config
    use_cache = config.use_cache
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.adopt_average()
    config.use_cache = use_cache  # transformers 5 turns it off, and would save it so

    by_main(lambda: save_final(cast(PreTrainedModel, student), tokenizer, folder))  # adapters are saved in the same way
    entry = {
        "name": stage.name,
        "match": stage.what.match,
        "trained": trained,
        "steps": trainer.state.global_step,
        "tokens": trainer.state.global_step * _tokens_a_step(trainer, run),
        "seconds": round(time.perf_counter() - start, 1),
        "resumed": checkpoint is not None,
        **describe(student, tokenizer, texts, run),
        "history": [log for log in trainer.state.log_history if "loss" in log or "eval_loss" in log],
    }
    by_main(lambda: write_text(folder / FINISHED, json.dumps(entry, indent=2) + "\n"))
    return entry


def _tokens_a_step(trainer: HoloTrainer, run: Distillation) -> int:
    windows = trainer.args.train_batch_size * trainer.args.gradient_accumulation_steps * count()
    return windows * run.texts.block_size


def make_trainer(
    stage: Stage,
    student: Student,
    loss: Loss,
    tokenizer: PreTrainedTokenizerBase,
    train: AnyWindows,
    texts: Texts,
) -> DistillTrainer:
    """Put student, data and optimizer together."""
    args = stage.training
    args.remove_unused_columns = False  # cached logits are not an argument of the model
    optimizer = make_optimizer(student, args, train)
    collator = DistillCollator(tokenizer.pad_token_id or 0)
    if count() > 1 and args.ddp_find_unused_parameters is None:  # to look for them in every step costs time
        args.ddp_find_unused_parameters = leaves_some_out(loss, student, collator([train[0]]))
    trainer = DistillTrainer(
        student,
        args,
        stage_loss=loss,
        data_collator=collator,
        train_dataset=train,
        eval_dataset=ConcatDataset(list(texts.validation.values())),
        processing_class=tokenizer,
        optimizers=(optimizer, None),
        callbacks=[CausalityCallback()] if args.causality_check else [],
        ema_decay=args.ema_decay,
    )
    show_progress(trainer)
    return trainer


def make_optimizer(student: nn.Module, args: DistillTrainingArguments, train: AnyWindows) -> Optimizer | None:
    """The optimizer that the stage names; None: Trainer makes it.

    Raises:
        HoloError: it does not fit what trains.
    """
    betas = (args.adam_beta1, args.adam_beta2)
    if args.optimizer == "whitened":
        some = evenly(train, FEATURE_WINDOWS)
        windows = torch.stack([some[i]["input_ids"] for i in range(len(some))])
        grams = feature_grams(student, windows)
        others = [p for p in student.parameters() if p.requires_grad and p not in grams]
        return WhitenedAdamW(grams, args.learning_rate, betas, args.adam_epsilon, others)
    if args.optimizer == "muon":
        try:
            return MuonAdamW.for_model(
                student, args.learning_rate, args.muon_lr_ratio, args.weight_decay, betas, args.adam_epsilon
            )
        except ValueError as error:
            raise HoloError(f"optimizer: 'muon' does not fit what trains in this stage: {error}") from None
    return None


@torch.no_grad()
def feature_grams(student: nn.Module, windows: torch.Tensor) -> dict[nn.Parameter, torch.Tensor]:
    """E[z zᵀ] of the features z = B x that the trained coefficients of every folded holographic layer weigh.

    Args:
        student: other parameters may train too.
        windows: token ids `[N, T]`.

    Returns:
        `[R, R]` for each trained parameter; layers with a common basis share it.
    """
    layers = [m for m in student.modules() if isinstance(m, HoloLinear) and m.folded and m.coefficients.requires_grad]
    if not layers:
        return {}
    grams: dict[HarmonicBasis, torch.Tensor] = {}

    def add(basis: HarmonicBasis, args: tuple[torch.Tensor], features: torch.Tensor) -> None:
        z = features.flatten(0, -2).double()  # [tokens, R]
        grams[basis] = grams.get(basis, 0) + z.T @ z / len(z)

    with removed_after([basis.register_forward_hook(add) for basis in {layer.basis for layer in layers}]):
        for window in windows:
            student(input_ids=window[None].to(student.device), use_cache=False)
    readers = Counter(layer.basis for layer in layers)  # each of them has added the same
    means = {basis: gram / (readers[basis] * len(windows)) for basis, gram in grams.items()}
    return {layer.coefficients: means[layer.basis] for layer in layers}


# ---------------------------------------------------------------------------------------------- scores
def describe(model: Student, tokenizer: PreTrainedTokenizerBase, texts: Texts, run: Distillation) -> dict[str, Any]:
    """Size of a model, its loss on every held-out text, and a sample; all processes take part."""
    batch = run.training.per_device_eval_batch_size
    scores = {}
    for name, windows in texts.validation.items():
        loss = held_out_loss(model, windows, batch, tokenizer.pad_token_id or 0, shared=True)
        scores[name] = {"loss": loss, "perplexity": math.exp(min(loss, 700))}
    tokens = run.texts.sample_tokens
    set_seed(run.training.seed)
    sample = generate_text(bare_model(model), tokenizer, texts.prompt, tokens) if tokens and is_main() else None
    return {"parameters": sum(p.numel() for p in model.parameters()), "scores": scores, "sample": sample}
