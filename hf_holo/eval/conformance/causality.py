"""Whether a causal model sees the future, in float64: three views of one question.

A suffix is exchanged, and nothing before it may move. The Jacobian of the outputs with respect to the input embeddings
must have a zero upper triangle. And the whole text at once must give what its prefixes give, each read alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from .checks import Violation, check
from .subject import EXACT, Subject

LENGTHS = (2, 17, 33, 64, 65, 129)  # on and beside the borders of the usual chunks
FAR_LENGTHS = (257, 1025)
CUTS = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 128)
FAR_CUTS = (128, 255, 256, 511, 512, 1023, 1024)
JACOBIAN_LENGTHS = (17, 40, 70)
PREFIX_LENGTH = 40
CHANGES = {"other tokens": None, "a tiny change of": 1e-3, "a large change of": 1e3}  # of embeddings, in their norms
NEGLIGIBLE, ROUNDING = 1e-10, 1e-5  # influence of the future that proves nothing: exact models, float32 inside
BATCH_OUTPUTS = 2**24  # numbers in the outputs of one batch


@dataclass(frozen=True)
class Leak:
    """An output that depends on a later input.

    Attributes:
        position: of the output.
        ahead: how many tokens further on an input lies that it was seen to depend on.
        size: of that influence, relative to the largest influence of an allowed input.
        how: what showed it.
    """

    position: int
    ahead: int
    size: float
    how: str

    def __str__(self) -> str:
        return f"position {self.position} sees {self.ahead} ahead ({self.how}; relative size {self.size:.1e})"


@dataclass(frozen=True)
class CausalityReport:
    """What [`check_causality`] found.

    Attributes:
        leaks: of each probe that found any, the one that sees farthest.
        teacher_forced_loss, stepwise_loss: nats per token of one random text, read at once and by prefixes only; None
            for a model without a language-modelling head.
    """

    leaks: tuple[Leak, ...]
    teacher_forced_loss: float | None
    stepwise_loss: float | None

    @property
    def passed(self) -> bool:
        return not self.leaks

    @property
    def lookahead(self) -> int:
        """How many tokens ahead the model was seen to look; 0 for an honest model."""
        return max((leak.ahead for leak in self.leaks), default=0)

    def __str__(self) -> str:
        if self.passed:
            return "causal: no output depends on a later input"
        return f"looks {self.lookahead} tokens ahead: " + "; ".join(map(str, self.leaks))


def check_causality(
    model: PreTrainedModel, lengths: Sequence[int] = LENGTHS, seed: int = 0, move_weights: bool = True
) -> CausalityReport:
    """Look for outputs of a language model that depend on later inputs.

    The model itself is left alone: a copy runs in float64 and evaluation mode.

    Args:
        model: a causal language model, or its backbone, of transformers or of anyone.
        lengths: lengths of the sequences to try, in tokens.
        seed: of the inputs and of the noise on the weights.
        move_weights: move the weights of the copy, so that no flat start hides a leak; False probes them as they are.

    Returns:
        A report with `passed`, `lookahead` and `leaks`.

    Raises:
        HoloError: `model` is no `PreTrainedModel`, is an encoder with a decoder, takes no token ids, or does not give
            one output per token.
        Violation: its outputs are not finite, so that nothing can be said.
    """
    subject = Subject(model, seed=seed, move_weights=move_weights)
    subject.require("text", "token outputs")
    return probe_causality(subject, lengths)


def probe_causality(subject: Subject, lengths: Sequence[int] = LENGTHS) -> CausalityReport:
    """[`check_causality`] of a subject."""
    readings = _readings(subject)
    probes = (
        _suffix_leaks(subject, lengths),
        _padding_leaks(subject),
        _jacobian_leaks(subject, [length for length in JACOBIAN_LENGTHS if length <= max(lengths)]),
        _prefix_leaks(subject, *readings),
    )
    leaks = [max(found, key=lambda leak: leak.ahead) for found in map(list, probes) if found]
    return CausalityReport(tuple(leaks), *_losses(subject, *readings))


# ---------------------------------------------------------------------------------------------- the checks
@check("causality", "text", "causal", "token outputs")
def suffix_exchange(subject: Subject) -> str:
    """Another suffix changes nothing before it: at many cuts and lengths, with tiny and large changes, in a batch."""
    return _verdict(_suffix_leaks(subject, LENGTHS))


@check("causality", "text", "causal", "token outputs", slow=True)
def suffix_exchange_far_out(subject: Subject) -> str:
    """The same with a thousand tokens, for models with long segments."""
    return _verdict(_suffix_leaks(subject, FAR_LENGTHS, FAR_CUTS))


@check("causality", "text", "causal", "token outputs", "attention_mask")
def suffix_exchange_with_padding(subject: Subject) -> str:
    """The same in a batch that is padded on the left or on the right."""
    return _verdict(_padding_leaks(subject))


@check("causality", "text", "causal", "token outputs", "inputs_embeds")
def zero_upper_triangle(subject: Subject) -> str:
    """The derivative of an output with respect to a later input embedding is zero."""
    return _verdict(_jacobian_leaks(subject, JACOBIAN_LENGTHS))


@check("causality", "text", "causal", "token outputs")
def stepwise_loss(subject: Subject) -> str:
    """The whole text at once gives what its prefixes give: the teacher-forced loss is the true one."""
    readings = _readings(subject)
    together, stepwise = _losses(subject, *readings)
    remark = "" if together is None else f"loss {together:.4f} at once, {stepwise:.4f} by prefixes"
    leaks = list(_prefix_leaks(subject, *readings))
    if leaks:
        raise Violation(f"the whole text gives other outputs than its prefixes: {leaks[0]}; {remark}")
    return remark


def _verdict(leaks: Iterator["Leak"]) -> str:
    farthest = max(leaks, key=lambda leak: leak.ahead, default=None)
    if farthest is not None:
        raise Violation(f"the model looks {farthest.ahead} tokens ahead: {farthest}")
    return "no look-ahead"


# ---------------------------------------------------------------------------------------------- the probes
def _suffix_leaks(subject: Subject, lengths: Sequence[int], cuts: Sequence[int] = CUTS) -> Iterator[Leak]:
    for length in subject.lengths(*lengths):
        yield from _exchange(subject, subject.ids(1, length), [cut for cut in cuts if cut < length])


def _padding_leaks(subject: Subject, length: int = 40, padding: int = 5) -> Iterator[Leak]:
    """Leaks of a padded row; on the right, the padding itself is a suffix that may not matter."""
    if "attention_mask" not in subject.arguments:
        return
    length = min(length, (subject.max_length or length + padding) - padding)
    cuts = [cut for cut in (1, 16, 31, 32, 33, length - 1) if 0 < cut < length]
    for left in (padding, 0):
        mask = F.pad(torch.ones(1, length, dtype=torch.long), (left, padding - left))
        ids = subject.ids(1, length + padding)
        yield from _exchange(subject, ids, [left + cut for cut in cuts], mask)
        if not left:
            yield from _exchange(subject, ids, [length], mask)


def _exchange(
    subject: Subject, ids: torch.Tensor, cuts: Sequence[int], mask: torch.Tensor | None = None
) -> Iterator[Leak]:
    """Leaks of one row of ids `[1, T]`: everything from a cut on is changed, for each cut and each size of change."""
    at_once = max(1, BATCH_OUTPUTS // (ids.shape[1] * subject.output_width) - 1)
    for how, size in CHANGES.items():
        if size is not None and "inputs_embeds" not in subject.arguments:
            continue
        for first in range(0, len(cuts), at_once):
            some = cuts[first : first + at_once]
            inputs = _with_other_suffixes(subject, ids, some, size)
            if mask is not None:
                inputs |= subject.masked(mask.expand(1 + len(some), -1))
            outputs = subject.run(**inputs)  # [1 + cuts, T, D]
            _assert_finite(outputs[0] if mask is None else outputs[0].where(mask[0, :, None] > 0, 0.0))
            moved = (outputs[1:] - outputs[:1]).abs().amax(-1)  # [cuts, T]
            for cut, row in zip(some, moved, strict=True):
                allowed = row[cut:].max().clamp_min(1e-6 * outputs[0].abs().max() * (size or 1.0))
                influence = row[:cut] / allowed
                if mask is not None:
                    influence = influence * mask[0, :cut]
                seeing = (~(influence <= _negligible(subject))).nonzero()  # NaN is an influence
                if len(seeing):
                    position = seeing[0].item()
                    phrase = f"{how} {'the suffix' if size else ''}".strip()
                    yield Leak(position, cut - position, influence[position].item(), f"{phrase} from {cut} on")


def _with_other_suffixes(
    subject: Subject, ids: torch.Tensor, cuts: Sequence[int], size: float | None
) -> dict[str, torch.Tensor]:
    """The row `[1, T]` and, below it, one copy for each cut with everything from the cut on changed."""
    later = torch.arange(ids.shape[1]) >= torch.tensor([ids.shape[1], *cuts])[:, None]  # [1 + cuts, T]
    if size is None:
        return {"input_ids": torch.where(later, subject.other_ids(ids), ids)}
    x = subject.embed(ids)  # [1, T, D]
    noise = torch.randn(x.shape, generator=subject.generator(2), dtype=x.dtype) * x.std()
    return {"inputs_embeds": x + size * noise * later[..., None]}


def _jacobian_leaks(subject: Subject, lengths: Sequence[int]) -> Iterator[Leak]:
    if "inputs_embeds" not in subject.arguments:
        return
    for length in subject.lengths(*lengths):
        jacobian = influence_of_inputs(subject, length)
        future = jacobian.triu(1) / jacobian.tril().max()
        for position, row in enumerate(future):
            seen = (~(row <= _negligible(subject))).nonzero()
            if len(seen):
                ahead = seen[-1].item() - position
                yield Leak(position, ahead, row.max().item(), f"Jacobian of {length} tokens")


def influence_of_inputs(subject: Subject, length: int) -> torch.Tensor:
    """The largest |∂ (a random reading of output t) / ∂ embedding s|, as a table `[t, s]`."""
    x = subject.embed(subject.ids(1, length)).requires_grad_()
    outputs = subject.run(inputs_embeds=x)[0]  # [T, D]
    _assert_finite(outputs)
    reading = torch.randn(outputs.shape[-1], generator=subject.generator(3), dtype=outputs.dtype)
    rows = [torch.autograd.grad(y, x, retain_graph=True)[0][0].abs().amax(-1) for y in outputs @ reading]
    return torch.stack(rows)


def _prefix_leaks(subject: Subject, together: torch.Tensor, stepwise: torch.Tensor) -> Iterator[Leak]:
    scale = together.abs().max()
    difference = (together - stepwise).abs().amax((0, 2)) / scale  # [T]
    seeing = (~(difference <= max(subject.tolerance, EXACT))).nonzero()
    if len(seeing):
        position = seeing[0].item()
        yield Leak(position, 1, difference[position].item(), "the whole text against its prefix")


def _losses(
    subject: Subject, together: torch.Tensor, stepwise: torch.Tensor
) -> tuple[float, float] | tuple[None, None]:
    """Nats per token of a random text, read at once and by prefixes."""
    if together.shape[-1] != subject.config.get_text_config().vocab_size:
        return None, None
    targets = subject.ids(2, _prefix_length(subject))[:, 1:].flatten()
    return tuple(F.cross_entropy(y[:, :-1].flatten(0, 1), targets).item() for y in (together, stepwise))


def _readings(subject: Subject) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs `[B, T, D]` of a text read at once, and of its prefixes, each read alone without a cache."""
    ids = subject.ids(2, _prefix_length(subject))
    ends = range(1, ids.shape[1] + 1)
    together, stepwise = subject.run(ids), torch.cat([subject.run(ids[:, :end])[:, -1:] for end in ends], 1)
    _assert_finite(together)
    return together, stepwise


def _assert_finite(outputs: torch.Tensor) -> None:
    """Raise [`Violation`] if an output `[..., T, D]` is NaN or infinite: it must not be taken for a leak."""
    wrong = (~outputs.isfinite()).any(-1).nonzero()
    if len(wrong):
        raise Violation(f"the output is NaN or infinite: first at position {wrong[:, -1].min()}")


def _prefix_length(subject: Subject) -> int:
    return subject.lengths(2, 10, PREFIX_LENGTH)[-1]


def _negligible(subject: Subject) -> float:
    return NEGLIGIBLE if subject.tolerance == EXACT else ROUNDING
