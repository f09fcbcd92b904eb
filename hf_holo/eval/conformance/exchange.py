"""Exchanging the end of a text, in whatever way the text is given to a model: what came before it must stay."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any, cast

import torch
from torch import nn

from ...modeling.cache import RecurrentCache
from .subject import Subject, main_output

ARGUMENTS = ("attention_mask", "position_ids", "labels")  # what Trainer and its collators send in addition to the ids
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
ROWS = (1, 2, 5, 9)
MANY_ROWS = 33
LENGTHS = (18, 41)
IGNORED = -100  # a label that no loss is wanted for


# ---------------------------------------------------------------------------------------------- settings
@dataclass(frozen=True)
class Setting:
    """One way to give texts to a model: all that a `forward` could tell a probe from a training step by.

    Attributes:
        rows, length: of the batch of token ids.
        dtype: of the weights.
        training: whether the model is in training mode; dropout draws the same numbers in every pass.
        arguments: what goes with the ids: a mask of ones, positions from 0 on, the ids as labels, `use_cache=True`.
        special: whether the text holds the special tokens of the config (end, padding and so on).
        mixed: whether it runs in mixed precision: the weights in `dtype`, products in bfloat16, as with `bf16=True`.
    """

    rows: int = 2
    length: int = LENGTHS[0]
    dtype: torch.dtype = torch.float64
    training: bool = False
    arguments: tuple[str, ...] = ()
    special: bool = False
    mixed: bool = False

    @property
    def precision(self) -> torch.dtype:
        """That of what it computes."""
        return torch.bfloat16 if self.mixed else self.dtype

    def autocast(self) -> torch.autocast:
        """What a model of this setting is called within."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.mixed)

    def __str__(self) -> str:
        dtype, mode = str(self.dtype).removeprefix("torch."), "training" if self.training else "evaluation"
        dtype = "mixed precision" if self.mixed else dtype
        given = ", ".join(["input_ids", *self.arguments])
        special = ", special tokens" if self.special else ""
        return f"{self.rows} x {self.length} tokens in {dtype} and {mode} mode, given {given}{special}"

    def inputs(self, subject: Subject, salt: int = 0) -> dict[str, Any]:
        """The arguments of `forward`."""
        ids = subject.ids(self.rows, self.length, salt)
        if self.special:
            ids = with_special_tokens(subject, ids)
        given = {
            "attention_mask": torch.ones_like(ids),
            "position_ids": torch.arange(self.length).expand_as(ids),
            "labels": ids % subject.output_width,  # a classifier of tokens has fewer classes than tokens
            "use_cache": True,
        }
        return {"input_ids": ids} | {name: given[name] for name in self.arguments}


def every_setting(subject: Subject) -> list[Setting]:
    """Every choice of arguments in every mode and precision, with changing rows, lengths and special tokens; and the
    same in mixed precision.

    The three that a training step is told by are tried in all combinations, the others are dealt out over them.
    """
    names = [name for name in ARGUMENTS if name in subject.arguments]
    given = [chosen for count in range(len(names) + 1) for chosen in combinations(names, count)]
    caching = ["use_cache"] * ("use_cache" in subject.arguments)
    lengths = subject.lengths(*LENGTHS) or subject.lengths(2)
    deal = random.Random(0)
    found = []
    for dtype, training, arguments in product(DTYPES, (False, True), given):
        rows, length, special = deal.choice(ROWS), deal.choice(lengths), deal.random() < 0.5
        arguments += tuple(deal.choice(([], caching)))
        found.append(Setting(rows, length, dtype, training, arguments, special and bool(subject.special_ids)))
    mixed = [
        Setting(2, lengths[number % len(lengths)], torch.float32, training, arguments, mixed=True)
        for number, (training, arguments) in enumerate(product((False, True), given))
    ]
    return [Setting(MANY_ROWS, lengths[0], arguments=tuple(names)), *found, *mixed]


def training_settings(subject: Subject, length: int = LENGTHS[1]) -> list[Setting]:
    """What a training step and an evaluation step of Trainer look like, in float32."""
    names = tuple(name for name in ("attention_mask", "labels") if name in subject.arguments)
    return [Setting(1, length, torch.float32, training, names) for training in (True, False)]


def with_special_tokens(subject: Subject, ids: torch.Tensor) -> torch.Tensor:
    """`ids` `[B, T]` with a special token at every fifth place or so."""
    special = torch.tensor(subject.special_ids)
    places = torch.rand(ids.shape, generator=subject.generator(7)) < 0.2
    return torch.where(places, special[torch.arange(ids.numel()).reshape(ids.shape) % len(special)], ids)


# ---------------------------------------------------------------------------------------------- exchanging
def with_other_suffix(inputs: dict[str, Any], later: torch.Tensor, others: torch.Tensor) -> dict[str, Any]:
    """The inputs with other ids, and other labels where there are any, at the places `later` `[B, T]`."""
    changed = inputs | {"input_ids": torch.where(later, others, inputs["input_ids"])}
    if inputs.get("labels") is not None:
        labels = inputs["labels"]
        known = others % (labels.max() + 1).clamp_min(1)  # classes, which there may be fewer of
        changed["labels"] = torch.where(later & (labels != IGNORED), known, labels)
    return changed


def prefix_losses(
    model: nn.Module, inputs: dict[str, Any], changed: dict[str, Any], later: torch.Tensor
) -> tuple[float, float]:
    """The loss of what comes before the places `later` `[B, T]`, with what was there and with what was put there.

    The first of these places keeps its label, since the place before it predicts that.
    """
    labels = inputs["labels"].masked_fill(later & later.roll(1, 1), IGNORED)
    read_both = (read(model, given | {"labels": labels}) for given in (inputs, changed))
    before, after = (cast(torch.Tensor, outputs.loss).item() for outputs in read_both)
    return before, after


@dataclass(frozen=True)
class Reading:
    """What a model gave for a batch: outputs `[B, T, D]`, or where it gives none of every token, the loss of a model
    that generates: its labels are shifted."""

    outputs: torch.Tensor | None
    loss: torch.Tensor | None


@torch.no_grad()
def read(model: nn.Module, inputs: dict[str, Any], seed: int = 0) -> Reading:
    """One pass that leaves the model as it was. Random numbers start from the seed."""
    _start_from(seed)
    given = {name: x.copy() if isinstance(x, RecurrentCache) else x for name, x in inputs.items()}  # it is updated
    with buffers_kept(model):
        output = model(**given)
    outputs = main_output(output)
    if outputs is not None and outputs.shape[:-1] == inputs_shape(inputs):
        return Reading(outputs, None)
    shifts = isinstance(output, dict) and getattr(model, "can_generate", lambda: False)()
    return Reading(None, output.get("loss") if shifts else None)


def _start_from(seed: int) -> None:
    """Seed all generators of random numbers."""
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)  # the other notes the stack for every device that there is not


def outputs_of(model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    """The outputs `[B, T, D]` of one pass, of a model that gives one of every token."""
    return cast(torch.Tensor, read(model, inputs).outputs)


def inputs_shape(inputs: dict[str, Any]) -> torch.Size:
    """Rows and length `[B, T]` of the text among the inputs."""
    ids = inputs.get("input_ids")
    return inputs["inputs_embeds"].shape[:2] if ids is None else ids.shape


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards the buffers are what they were: a pass in training mode may count, or keep running statistics."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


def precision_of(model: nn.Module) -> torch.dtype:
    """That in which it computes here and now."""
    mixed = torch.is_autocast_enabled("cpu")
    return torch.get_autocast_dtype("cpu") if mixed else next(model.parameters()).dtype


def movement(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """How far outputs `[B, T, D]` moved, the root mean square over channels: `[B, T]` in float64.

    Not the largest channel: rounding moves a few channels, what a model sees moves them all.
    """
    rows = zip(before, after, strict=True)  # one at a time, since the logits of a whole batch are large
    return torch.stack([(new.double() - old.double()).square().mean(-1).sqrt() for old, new in rows])


def size_of(outputs: torch.Tensor) -> torch.Tensor:
    """The root mean square of outputs, in float64."""
    return torch.stack([row.double().square().mean() for row in outputs]).mean().sqrt().clamp_min(1e-30)
