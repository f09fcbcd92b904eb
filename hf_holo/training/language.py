"""The tasks of language models: to predict the next token, or masked ones."""

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from accelerate import PartialState
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)

from ..data.documents import hold_out_documents, read_documents, split_documents
from ..data.instructions import Responses, alpaca_prompt, instruction_splits, read_records
from ..data.masking import Masking, MaskingCollator, filled_sample, masked_splits
from ..data.tokenizers import TOKENIZERS, add_mask, default_kind, make_tokenizer, saved_tokenizer
from ..data.windows import Collator, Splits, document_splits, text_splits
from ..errors import HoloError
from ..eval.conformance.causality import CausalityReport, check_causality
from ..eval.conformance.checks import Violation
from ..eval.metrics import LanguageScores
from ..files import write_text
from ..generate import generate_text
from ..hub.card import write_card
from .callbacks import PROBED_LENGTHS, CausalityCallback
from .report import folder_of, loss_line
from .task import Task
from .trainer import HoloTrainer


class LanguageTask(Task):
    """What both tasks share; the processor is a tokenizer."""

    unit, loss_unit = "windows", "nats per token"
    masked: ClassVar[bool]
    processor: PreTrainedTokenizerBase
    data: Splits

    def load(self, checkpoint: Path | None) -> None:
        """Read, split and encode the data, with the tokenizer of the checkpoint if there is one, else a new one."""
        self.data = self._splits(checkpoint)
        self.train, self.validation = self.data.train, self.data.validation

    def _splits(self, checkpoint: Path | None) -> Splits:
        data, apart = self.run.data, self.run.data.documents == "apart"
        if data.data_format == "alpaca":
            if data.eval_windows:
                raise HoloError(f"eval_windows: {data.eval_windows} has no meaning for instructions; all are scored")
            records = read_records(data.train_file, data.dataset_name, data.dataset_config_name)
            self.processor = self._tokenizer(checkpoint, [alpaca_prompt(r) + r["output"] for r in records])
            splits = instruction_splits(records, self.processor, data.block_size, data.validation_fraction)
            return replace(splits, documents=len(records))
        documents = read_documents(data.train_file, data.dataset_name, data.dataset_config_name, data.text_column)
        parts = (hold_out_documents if apart else split_documents)(documents, data.validation_fraction)
        tokenizer = self.processor = self._tokenizer(checkpoint, parts[0])
        if self.masked:
            splits = masked_splits(*parts, tokenizer, data.block_size, data.stride, apart, data.mlm_probability)
        else:
            splits = (document_splits if apart else text_splits)(*parts, tokenizer, data.block_size, data.stride)
        return replace(splits.scored_on(data.eval_windows), documents=len(documents))

    def _tokenizer(self, checkpoint: Path | None, texts: list[str]) -> PreTrainedTokenizerBase:
        """The tokenizer of the checkpoint or of the model that the run starts from, or else the one that the arguments
        ask for, made from `texts`; with a mask token where it is needed.

        Raises:
            HoloError: there is none, or it is damaged.
        """
        data, source = self.run.data, self.run.model.model_name_or_path
        if checkpoint:
            tokenizer = saved_tokenizer(checkpoint, "resume_from_checkpoint")
        elif source:
            tokenizer = saved_tokenizer(source, "model_name_or_path")
        elif data.tokenizer is None or data.tokenizer in TOKENIZERS:
            kind = data.tokenizer or default_kind(self.config.model_type)
            PartialState().print(f"tokenizer: {kind}, made from the training text (--tokenizer names another)")
            return make_tokenizer(kind, texts, data.vocab_size, self.masked)
        else:
            argument = f"tokenizer: none of {', '.join(TOKENIZERS)}"
            tokenizer = saved_tokenizer(data.tokenizer, argument, local_files_only=True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return add_mask(tokenizer) if self.masked else tokenizer

    def model_values(self) -> dict[str, Any]:
        tokens = {f"{name}_token_id": getattr(self.processor, f"{name}_token_id") for name in ("pad", "bos", "eos")}
        return {"vocab_size": len(self.processor), **tokens}

    def check_model(self, model: PreTrainedModel) -> None:
        if len(self.processor) > model.config.vocab_size:
            raise HoloError(
                f"vocab_size: the tokenizer has {len(self.processor)} tokens, the model only "
                f"{model.config.vocab_size}; use the tokenizer that belongs to the model, or a larger vocab_size"
            )

    def scores(self) -> LanguageScores:
        return LanguageScores(self.data.characters, shift=not self.masked)

    def description(self) -> list[str]:
        data = self.data
        share = data.tokens / max(data.tokens + data.train_tokens, 1)
        documents = f"{data.documents:,} {'documents' if data.documents != 1 else 'document'}"
        return [
            f"data: {self.name_of_data()}, {documents}",
            f"      {data.train_tokens:,} tokens to learn from, in {len(data.train):,} windows of up to "
            f"{self.run.data.block_size}; {data.tokens:,} held-out tokens are scored ({share:.1%})",
        ]

    def model_knows(self) -> str:
        return f"{len(self.processor):,} tokens known"

    def write_results(self, trainer: HoloTrainer, metrics: dict[str, float]) -> None:
        """Write the model card and the samples."""
        folder = folder_of(self.run.training)
        write_card(folder, self.judged(trainer.model))
        set_seed(self.run.training.seed)
        tokens = self.data.tokens
        if isinstance(self.validation, Responses):
            self._write_answers(trainer.model, self.validation, folder / "answers.txt")
            before = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
            print("\n" + loss_line(before, tokens, "held-out response loss before training"))
            print(loss_line(metrics, tokens, "held-out response loss after training"))
        else:
            sample = self.sample(trainer.model)
            write_text(folder / "sample.txt", sample)
            print(f"\nA sample ({folder / 'sample.txt'}):\n{sample[:400]}\n")
            print(loss_line(metrics, tokens, "validation loss"))

    def judged(self, model: PreTrainedModel) -> CausalityReport | None:
        """What the probes say of the final weights; None where they do not apply, were turned off, or cannot judge."""
        return None

    def sample(self, model: PreTrainedModel) -> str:
        """What the model makes of the prompt."""
        raise NotImplementedError

    def _write_answers(self, model: PreTrainedModel, held_out: Responses, path: Path) -> None:
        """Let the model answer the first held-out instructions, next to the answers in the data."""
        parts = []
        for record in held_out.records[: self.run.data.num_answers]:
            text = generate_text(model, self.processor, alpaca_prompt(record), self.run.data.sample_tokens)
            parts.append(f"{text}\n\n--- answer in the data:\n{record['output']}\n")
        write_text(path, f"\n{'=' * 80}\n".join(parts))


class CausalTask(LanguageTask):
    """Predict the next token."""

    auto_class = AutoModelForCausalLM
    masked = False

    def collator(self) -> Collator:
        return Collator(self.processor.pad_token_id or 0)

    def callbacks(self) -> list[TrainerCallback]:
        return [CausalityCallback()] if self.run.training.causality_check else []

    def judged(self, model: PreTrainedModel) -> CausalityReport | None:
        if not self.run.training.causality_check:
            return None
        try:
            return check_causality(model, PROBED_LENGTHS)
        except Violation as violation:
            print(f"The causality of the final weights cannot be judged: {violation}")
            return None

    def sample(self, model: PreTrainedModel) -> str:
        """The prompt and what the model continues it with; without one, the start of the validation text."""
        prompt = self.run.data.sample_prompt
        prompt = self.data.prompt if prompt is None else prompt
        return generate_text(model, self.processor, prompt, self.run.data.sample_tokens)


class MaskedTask(LanguageTask):
    """Predict masked tokens."""

    auto_class = AutoModelForMaskedLM
    masked = True

    def load(self, checkpoint: Path | None) -> None:
        if self.run.data.data_format == "alpaca":
            raise HoloError("task: 'masked' hides tokens of plain text; instructions are learned with --task causal")
        super().load(checkpoint)

    def collator(self) -> MaskingCollator:
        masking = Masking(self.processor, self.run.data.mlm_probability)
        return MaskingCollator(masking, self.processor.pad_token_id or 0, self.run.training.seed)

    def sample(self, model: PreTrainedModel) -> str:
        """The prompt with its gaps filled, or with one at its end; without a prompt, held-out text."""
        prompt, tokenizer = self.run.data.sample_prompt, self.processor
        if prompt is None:
            return filled_sample(model, tokenizer, **self.validation[0])
        prompt = prompt if tokenizer.mask_token in prompt else prompt + tokenizer.mask_token
        return filled_sample(model, tokenizer, tokenizer(prompt, return_tensors="pt").input_ids[0])
