"""What a student is compared with in distillation: outputs of layers and blocks, hidden states, logits.

"layers" and "blocks" are compared where both read the same: every part of the student gets the input that its
counterpart in the teacher had, so that all parts learn at once, and none has to undo the errors of those before it.
(MOHAWK, Bick et al., 2024, aligns a block at a time in this way.) "hidden_states" and "logits" let the student run on
its own.

Every loss is a mean over the tokens of a batch. In several processes the mean of their losses is that of one process
which has all their batches: what depends on a whole batch is found over all of them, and rows that a process has only
to fill up its last batch weigh nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ...data.scoring import summed_losses
from ...distributed.processes import side_by_side
from ...errors import HoloError
from ...modeling.harmonics import HoloLinear
from ...modeling.modeling_hsn import HolographicMixer
from ..surgery.plan import block_list
from ..surgery.transfer import source_of

MATCHES = ("layers", "blocks", "hidden_states", "logits")
ROW_WEIGHTS = "row_weights"  # [B] of a batch whose rows do not count alike; their mean over all processes is 1
SMALL = 0.1  # of the median size of a token: below it the error is not blown up any further

Batch = dict[str, torch.Tensor]
Loss = Callable[[PreTrainedModel, Batch], torch.Tensor]


class Twins(NamedTuple):
    """A part of the student and the part of the teacher that it stands for."""

    student: nn.Module
    teacher: nn.Module


class Passage(NamedTuple):
    """What went into a module and what came out, both `[B, T, D]`."""

    entered: torch.Tensor
    left: torch.Tensor


def converted_layers(student: PreTrainedModel, teacher: PreTrainedModel) -> dict[str, Twins]:
    """The layers that conversion made, by name in the student, with those that they replace.

    A [`HoloLinear`] stands for the layer of its name, a [`HolographicMixer`] for the attention of its block. What the
    teacher has as well was not converted.

    Raises:
        HoloError: the teacher has no such layer, or nothing was converted.
    """
    theirs, blocks = dict(teacher.named_modules()), block_list(student)
    twins = {}
    for name, module in student.named_modules():
        if not isinstance(module, (HoloLinear, HolographicMixer)) or isinstance(theirs.get(name), type(module)):
            continue
        name = name.removesuffix(".base_layer")  # an adapter has been put around it
        if isinstance(module, HolographicMixer):
            index = int(name.removeprefix(f"{blocks}.").partition(".")[0])
            twin = _blocks(teacher)[index].get_submodule(source_of(teacher)["mixer"])
        elif name in theirs:
            twin = theirs[name]
        else:
            raise HoloError(
                f"match: 'layers', but the teacher has no layer {name!r}; match 'hidden_states' or 'logits'"
            )
        twins[name] = Twins(student.get_submodule(name), twin)
    if not twins:
        raise HoloError("student: nothing in it was converted; name what to train with `trainable`")
    return twins


def block_twins(student: PreTrainedModel, teacher: PreTrainedModel) -> list[Twins]:
    """Blocks of the same index.

    Raises:
        HoloError: the models differ in depth or width.
    """
    pairs = (_blocks(student), _blocks(teacher))
    if len(pairs[0]) != len(pairs[1]):
        raise HoloError(f"student: it has {len(pairs[0])} blocks, the teacher {len(pairs[1])}; match 'logits' only")
    embeddings: list[Any] = [model.get_input_embeddings() for model in (student, teacher)]
    widths = [embedding.weight.shape[1] for embedding in embeddings]
    if widths[0] != widths[1]:
        raise HoloError(f"student: its hidden states have width {widths[0]}, the teacher's {widths[1]}; match 'logits'")
    return [Twins(*pair) for pair in zip(*pairs, strict=True)]


def _blocks(model: PreTrainedModel) -> nn.ModuleList:
    return cast(nn.ModuleList, model.get_submodule(block_list(model)))


# ---------------------------------------------------------------------------------------------- outputs
def output_loss(teacher: PreTrainedModel, twins: list[Twins], residual: bool) -> Loss:
    """Compare the outputs of counterparts that read the same: the input of the teacher's.

    Args:
        residual: they are blocks, which add to what they read; the error is relative to what the teacher's adds.
    """

    def loss(student: PreTrainedModel, batch: Batch) -> torch.Tensor:
        wanted = _teacher_passages(teacher, [twin.teacher for twin in twins], batch)
        feed = [passage.entered for passage in wanted]
        with recorded([twin.student for twin in twins], feed) as found:
            student.base_model(input_ids=batch["input_ids"], use_cache=False)
        references = [passage.left - passage.entered if residual else passage.left for passage in wanted]
        return relative_error([found[i].left for i in range(len(wanted))], wanted, references, batch)

    return loss


def hidden_state_loss(teacher: PreTrainedModel, twins: list[Twins]) -> Loss:
    """Compare what leaves every block, the student reading its own hidden states."""

    def loss(student: PreTrainedModel, batch: Batch) -> torch.Tensor:
        wanted = _teacher_passages(teacher, [twin.teacher for twin in twins], batch)
        with recorded([twin.student for twin in twins]) as found:
            student.base_model(input_ids=batch["input_ids"], use_cache=False)
        references = [passage.left for passage in wanted]
        return relative_error([found[i].left for i in range(len(wanted))], wanted, references, batch)

    return loss


@torch.no_grad()
def _teacher_passages(teacher: PreTrainedModel, modules: list[nn.Module], batch: Batch) -> list[Passage]:
    with recorded(modules) as passages:
        teacher.base_model(input_ids=batch["input_ids"], use_cache=False)
    return [passages[i] for i in range(len(modules))]


def relative_error(
    outputs: list[torch.Tensor], wanted: list[Passage], references: list[torch.Tensor], batch: Batch
) -> torch.Tensor:
    """Mean over parts and tokens of ‖output − wanted output‖² / ‖reference‖², all `[B, T, D]`.

    Token by token, because single tokens of large models have hidden states a thousand times longer than the others.
    """
    sizes = [reference.float().square().sum(-1) for reference in references]  # [B, T]
    errors = []
    for output, passage, size, middle in zip(outputs, wanted, sizes, medians(sizes, batch), strict=True):
        error = (output.float() - passage.left.float()).square().sum(-1)
        errors.append(mean_over_tokens(error / size.clamp_min(SMALL * middle), batch))
    return torch.stack(errors).mean()


def medians(sizes: list[torch.Tensor], batch: Batch) -> torch.Tensor:
    """The median of each `[B, T]` over the batches of all processes, without rows that weigh nothing: `[parts]`."""
    tokens = batch["input_ids"].numel()
    rows = torch.full((len(sizes), tokens), torch.nan, device=sizes[0].device)
    weights = batch.get(ROW_WEIGHTS)
    for row, size in zip(rows, sizes, strict=True):
        if weights is not None:
            size = torch.where(weights[:, None] > 0, size, torch.nan)
        row[: size.numel()] = size.flatten()  # an expert reads fewer tokens
    return side_by_side(rows).nanmedian(-1).values


def mean_over_tokens(values: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Mean of `[B, T]` with the weights of the rows, if the batch has some."""
    weights = batch.get(ROW_WEIGHTS)
    return values.mean() if weights is None else (values * weights[:, None]).mean()


@contextmanager
def recorded(modules: list[nn.Module], feed: list[torch.Tensor] | None = None) -> Iterator[dict[int, Passage]]:
    """Record what passes through the modules, by their place in the list; `feed` replaces what they would read."""
    passages: dict[int, Passage] = {}
    hooks = []
    for place, module in enumerate(modules):
        if feed is not None:
            replace = _replacing(feed[place])
            hooks.append(module.register_forward_pre_hook(replace, with_kwargs=True))

        def note(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any, place: int = place) -> None:
            passages[place] = Passage(_read(args, kwargs), output[0] if isinstance(output, tuple) else output)

        hooks.append(module.register_forward_hook(note, with_kwargs=True))
    try:
        yield passages
    finally:
        for hook in hooks:
            hook.remove()


def _read(args: tuple, kwargs: dict) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _replacing(value: torch.Tensor) -> Callable:
    def replace(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return ((value, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": value})

    return replace


# ---------------------------------------------------------------------------------------------- logits
@dataclass(frozen=True)
class SoftLabels:
    """The teacher's distribution over the next token, softened by a temperature: all of it, or its largest part.

    Attributes:
        log_probs: `[B, T, K]` natural logarithms.
        indices: `[B, T, K]` tokens that they belong to; None: all tokens in their order.
    """

    log_probs: torch.Tensor
    indices: torch.Tensor | None = None

    @classmethod
    def of(cls, logits: torch.Tensor, temperature: float, top_k: int | None = None) -> "SoftLabels":
        """From logits `[B, T, V]`; `top_k` keeps only the most likely tokens."""
        log_probs = F.log_softmax(logits.float() / temperature, -1)
        return cls(log_probs) if top_k is None else cls(*log_probs.topk(top_k, -1))

    def divergence(self, logits: torch.Tensor, temperature: float) -> torch.Tensor:
        """KL(teacher ‖ student) of every token `[B, T]`, in nats, times the squared temperature (Hinton et al., 2015).

        What the kept tokens leave over counts as one more token, on both sides.
        """
        student = F.log_softmax(logits.float() / temperature, -1)  # [B, T, V]
        kept = student if self.indices is None else student.gather(-1, self.indices)
        divergence = (self.log_probs.exp() * (self.log_probs - kept)).sum(-1)
        if self.indices is not None and self.log_probs.shape[-1] < student.shape[-1]:
            rest = (1 - self.log_probs.exp().sum(-1)).clamp_min(1e-8)
            others = student.scatter(-1, self.indices, float("-inf")).logsumexp(-1)
            divergence = divergence + rest * (rest.log() - others)
        return divergence * temperature**2


def logit_loss(teacher: PreTrainedModel, temperature: float, hard_labels: float) -> Loss:
    """Compare distributions over the next token; soft labels that come with the batch spare the teacher its work.

    Args:
        hard_labels: share of the loss that is the cross-entropy with the text itself.
    """

    def loss(student: PreTrainedModel, batch: Batch) -> torch.Tensor:
        if "teacher_log_probs" in batch:
            soft = SoftLabels(batch["teacher_log_probs"], batch["teacher_indices"].long())
        else:
            with torch.no_grad():
                soft = SoftLabels.of(teacher(input_ids=batch["input_ids"], use_cache=False).logits, temperature)
        logits = student(input_ids=batch["input_ids"], use_cache=False).logits
        divergence = mean_over_tokens(soft.divergence(logits, temperature), batch)
        if not hard_labels:
            return divergence
        nats, labels = summed_losses(logits, batch["labels"]).unbind(1)  # [B]
        text = mean_over_tokens((nats / labels)[:, None], batch)  # rows have the same number of labels
        return (1 - hard_labels) * divergence + hard_labels * text

    return loss
