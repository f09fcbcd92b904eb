"""Whether a causal model sees the future: three views of one question.

A suffix is exchanged, and nothing before it may move: in float64 at many lengths, and in every way in which a training
step gives texts to a model. The Jacobian of the outputs with respect to the input embeddings must have a zero upper
triangle. And the whole text at once must give what its prefixes give, each read alone. A model is tested at some
thousand points; that it would pass at every other one is not proved.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ...errors import HoloError, first_line
from .checks import Violation, check
from .exchange import (
    Setting,
    every_setting,
    movement,
    outputs_of,
    precision_of,
    prefix_losses,
    read,
    size_of,
    training_settings,
    with_other_suffix,
)
from .subject import EXACT, Subject

LENGTHS = (2, 17, 33, 64, 65, 129)  # on and next to the borders of the usual chunks
FAR_LENGTHS = (257, 1025)
CUTS = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 128)
FAR_CUTS = (128, 255, 256, 511, 512, 1023, 1024)
JACOBIAN_LENGTHS = (17, 66)
PREFIX_LENGTH = 40
CHANGES = {"other tokens": None, "a tiny change of": 1e-3, "a large change of": 1e3}  # of embeddings, in their norms
NEGLIGIBLE, ROUNDING = 1e-10, 1e-5  # influence of the future that proves nothing: exact models, float32 inside
FLOORS = {torch.float64: 0.0, torch.float32: 2e-6, torch.bfloat16: 0.01}  # the same relative to the outputs: some ulps
TINY = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 4e-3}  # a change of embeddings that is rounding alone
OVER_ROUNDING = 30  # times what such a change moves is more than rounding
DRAWS = 3  # other suffixes that must all show what might be rounding
LOSSES = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 0.03}  # relative; losses are computed in float32
# Relative movement that proves nothing in a batch of Trainer, in float32 and in half precision.
OUTPUTS_IN_BATCHES, LOSSES_IN_BATCHES = (1e-3, 0.05), (2e-5, 5e-3)
USUAL_LENGTHS = (128, 256, 257, 512, 768, 1024, 1536, 2048)  # powers of two, and what else a batch may be cut to
LONGEST = 4096  # tokens, of the text that is as long as the model takes
SIZES = ("block", "chunk", "window", "segment")  # words in the names of config fields that hold a length
BATCH_OUTPUTS = 2**24  # values in the outputs of one batch
TEXT_OUTPUTS = 2**26  # and of one text


@dataclass(frozen=True)
class Leak:
    """An output that depends on a later input.

    Attributes:
        position: of the output.
        ahead: how many tokens later the input comes that it was seen to depend on.
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
class Point:
    """One comparison: a length, a cut, a change, a setting.

    Attributes:
        length: of the text, in tokens.
        leak: what it showed; None for nothing.
        untested: why it could not be made; None if it could.
    """

    length: int
    leak: Leak | None = None
    untested: str | None = None


@dataclass(frozen=True)
class CausalityReport:
    """What [`check_causality`] found.

    Attributes:
        leaks: of each probe that found any, the one that sees farthest.
        teacher_forced_loss, stepwise_loss: nats per token of one random text, read at once and by prefixes only; None
            for a model without a language-modelling head.
        points: how many comparisons were made.
        longest: tokens of the longest text among them.
        untested: what could not be tried, and why.
    """

    leaks: tuple[Leak, ...]
    teacher_forced_loss: float | None
    stepwise_loss: float | None
    points: int = 0
    longest: int = 0
    untested: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.leaks

    @property
    def lookahead(self) -> int:
        """How many tokens ahead the model was seen to look; 0 if it was not seen to."""
        return max((leak.ahead for leak in self.leaks), default=0)

    def __str__(self) -> str:
        if not self.passed:
            return f"looks {self.lookahead} tokens ahead: " + "; ".join(map(str, self.leaks))
        untested = "".join(f"; not tested: {reason}" for reason in self.untested)
        return f"no look-ahead, tested at {self.points:,} points in texts of up to {self.longest:,} tokens{untested}"


def check_causality(
    model: PreTrainedModel, lengths: Sequence[int] | None = None, seed: int = 0, move_weights: bool = True
) -> CausalityReport:
    """Look for outputs of a language model that depend on later inputs.

    The model itself is left alone: copies run in float64, float32 and bfloat16, in evaluation and training mode, with
    and without what Trainer sends. It tests at some thousand points and proves nothing about others; a run of Trainer
    is tested on its own batches by [`CausalityCallback`].

    Args:
        model: a causal language model, or its backbone, of transformers or of anyone.
        lengths: lengths of the sequences to try, in tokens; default: those next to the borders of usual chunks, powers
            of two, the sizes of blocks that the config names, and the most that the model takes (up to 4,096).
        seed: of the inputs and of the noise on the weights.
        move_weights: move the weights of the copy, so that no flat start hides a leak; False probes them as they are.

    Returns:
        A report with `passed`, `lookahead` and `leaks`.

    Raises:
        HoloError: `model` is not a `PreTrainedModel`, is an encoder with a decoder, takes no token ids, does not
            give one output per token, or cannot compute in float64.
        Violation: its outputs are not finite, so that nothing can be said.
    """
    subject = Subject(model, seed=seed, move_weights=move_weights)
    try:
        subject.require("text", "token outputs")
    except RuntimeError as error:  # its first pass
        raise HoloError(f"model: {subject.name} cannot be checked in float64: {first_line(error)}") from error
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        return probe_causality(subject, lengths)


def probe_causality(
    subject: Subject, lengths: Sequence[int] | None = None, settings: Sequence[Setting] | None = None
) -> CausalityReport:
    """[`check_causality`] of a subject, in these settings only if some are given. It draws random numbers."""
    near = LENGTHS if lengths is None else lengths
    readings = _readings(subject)
    teacher_forced_loss, stepwise_loss = _losses(subject, *readings)
    probes = [
        _suffix_points(subject, near),
        _padding_points_if_finite(subject),
        _setting_points(subject, every_setting(subject) if settings is None else settings),
        _jacobian_points(subject, [length for length in JACOBIAN_LENGTHS if length <= max(near)]),
        _prefix_points(subject, *readings),
    ]
    if lengths is None:
        probes.append(_length_points(subject))
    found = [list(points) for points in probes]
    points = [point for probe in found for point in probe]
    leaks = [[point.leak for point in probe if point.leak is not None] for probe in found]
    return CausalityReport(
        tuple(max(some, key=lambda leak: leak.ahead) for some in leaks if some),
        teacher_forced_loss,
        stepwise_loss,
        points=sum(point.untested is None for point in points),
        longest=max(point.length for point in points),
        untested=_untested(points),
    )


# ---------------------------------------------------------------------------------------------- the checks
@check("causality", "text", "causal", "token outputs")
def suffix_exchange(subject: Subject) -> str:
    """Another suffix changes nothing before it: at many cuts and lengths, with tiny and large changes, in a batch."""
    return _verdict(_suffix_points(subject, LENGTHS))


@check("causality", "text", "causal", "token outputs", slow=True)
def suffix_exchange_far_out(subject: Subject) -> str:
    """The same with a thousand tokens, for models with long segments."""
    return _verdict(_suffix_points(subject, FAR_LENGTHS, FAR_CUTS))


@check("causality", "text", "causal", "token outputs")
def suffix_exchange_at_usual_lengths(subject: Subject) -> str:
    """The same at powers of two, at the sizes of blocks that the config names, and at the most tokens it takes."""
    return _verdict(_length_points(subject))


@check("causality", "text", "causal", "token outputs", "attention_mask")
def suffix_exchange_with_padding(subject: Subject) -> str:
    """The same in a batch that is padded on the left or on the right."""
    return _verdict(_padding_points(subject))


@check("causality", "text", "causal", "token outputs")
def suffix_exchange_in_every_setting(subject: Subject) -> str:
    """The same with masks of ones, positions, labels, special tokens and caches, in training, rounded, in batches."""
    return _verdict(_setting_points(subject, every_setting(subject)))


@check("causality", "text", "causal", "token outputs", "inputs_embeds")
def zero_upper_triangle(subject: Subject) -> str:
    """The derivative of an output with respect to a later input embedding is zero."""
    return _verdict(_jacobian_points(subject, JACOBIAN_LENGTHS))


@check("causality", "text", "causal", "token outputs")
def stepwise_loss(subject: Subject) -> str:
    """The whole text at once gives what its prefixes give: the teacher-forced loss is the true one."""
    readings = _readings(subject)
    together, stepwise = _losses(subject, *readings)
    remark = "" if together is None else f"loss {together:.4f} at once, {stepwise:.4f} by prefixes"
    leaks = [point.leak for point in _prefix_points(subject, *readings) if point.leak is not None]
    if leaks:
        raise Violation(f"the whole text gives other outputs than its prefixes: {leaks[0]}; {remark}")
    return remark


def _verdict(points: Iterable[Point]) -> str:
    points = list(points)
    leaks = [point.leak for point in points if point.leak is not None]
    if leaks:
        farthest = max(leaks, key=lambda leak: leak.ahead)
        raise Violation(f"the model looks {farthest.ahead} tokens ahead: {farthest}")
    untested = "".join(f"; not tested: {reason}" for reason in _untested(points))
    return f"no look-ahead, tested at {sum(point.untested is None for point in points):,} points{untested}"


def _untested(points: Iterable[Point]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(point.untested for point in points if point.untested is not None))


# ---------------------------------------------------------------------------------------------- a suffix, in float64
def _suffix_points(subject: Subject, lengths: Sequence[int], cuts: Sequence[int] = CUTS) -> Iterator[Point]:
    for length in subject.lengths(*lengths):
        yield from _exchange(subject, subject.ids(1, length), [cut for cut in cuts if cut < length])


def _padding_points(subject: Subject, length: int = 40, padding: int = 5) -> Iterator[Point]:
    """A padded row; on the right, the padding itself is a suffix that must not matter."""
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


def _padding_points_if_finite(subject: Subject) -> Iterator[Point]:
    """A model that is right without padding may give NaN with it, which says nothing of look-ahead."""
    try:
        yield from _padding_points(subject)
    except Violation as violation:
        yield Point(0, untested=f"padding: {violation}")


def _exchange(
    subject: Subject, ids: torch.Tensor, cuts: Sequence[int], mask: torch.Tensor | None = None
) -> Iterator[Point]:
    """One row of ids `[1, T]`: everything from a cut on is changed, for each cut and each size of change."""
    length = ids.shape[1]
    given = {} if mask is None else subject.masked(mask)
    real = torch.ones(length, dtype=torch.bool) if mask is None else mask[0] > 0
    at_once = max(1, BATCH_OUTPUTS // (length * subject.output_width) - 1)
    leaks = False
    for how, size in CHANGES.items():
        if size is not None and "inputs_embeds" not in subject.arguments:
            continue
        for first in range(0, len(cuts), at_once):
            some = cuts[first : first + at_once]
            inputs: dict[str, Any] = _with_other_suffixes(subject, ids, some, size)
            inputs |= {name: x.expand(1 + len(some), -1) for name, x in given.items()}
            with torch.no_grad():
                outputs = subject.run(**inputs)  # [1 + cuts, T, D]
            _assert_finite(outputs[0].where(real[:, None], 0.0))
            moved = (outputs[1:] - outputs[:1]).abs().amax(-1)  # [cuts, T]
            for cut, row in zip(some, moved, strict=True):
                allowed = row[cut:].max().clamp_min(1e-6 * outputs[0].abs().max() * (size or 1.0))
                influence = (row[:cut] / allowed).where(real[:cut], 0.0)
                seeing = (~(influence <= NEGLIGIBLE)).nonzero()  # NaN is an influence
                leak = None
                inputs = {"input_ids": ids, **given}
                if len(seeing) and (leaks or _stands_out(subject, subject.model, inputs, cut, size)):
                    leaks = True
                    position = int(seeing[0])
                    phrase = f"{how} {'the suffix' if size else ''}".strip()
                    leak = Leak(position, cut - position, influence[position].item(), f"{phrase} from {cut} on")
                yield Point(length, leak)


def _with_other_suffixes(
    subject: Subject, ids: torch.Tensor, cuts: Sequence[int], size: float | None
) -> dict[str, torch.Tensor]:
    """The row `[1, T]` and, below it, one copy for each cut with everything from the cut on changed."""
    later = torch.arange(ids.shape[1]) >= torch.tensor([ids.shape[1], *cuts])[:, None]  # [1 + cuts, T]
    if size is None:
        return {"input_ids": torch.where(later, subject.other_ids(ids), ids)}
    return {"inputs_embeds": _moved_embeddings(subject, ids, later, size)}


def _moved_embeddings(
    subject: Subject, ids: torch.Tensor, later: torch.Tensor, size: float, salt: int = 2
) -> torch.Tensor:
    """Embeddings of `ids` in float64, with noise of `size` times their own size at the places `later`."""
    x = subject.embed(ids)  # [B, T, D]
    noise = torch.randn(x.shape, generator=subject.generator(salt), dtype=x.dtype) * x.std()
    return x + size * noise * later[..., None]


# ---------------------------------------------------------------------------------------------- a suffix, in a setting
def _length_points(subject: Subject) -> Iterator[Point]:
    """Two cuts of one text of each usual length, in float64 and as a training step gives it."""
    lengths = usual_lengths(subject)
    yield from _setting_points(subject, [Setting(1, length) for length in lengths])
    yield from _setting_points(subject, [training_settings(subject, length)[0] for length in lengths])


def usual_lengths(subject: Subject) -> list[int]:
    """Lengths of texts, in tokens, at which models do something of their own, and which they are trained with."""
    config = subject.config.get_text_config().to_dict()
    sizes = [n for name, n in config.items() if isinstance(n, int) and any(word in name for word in SIZES)]
    near = [length for size in sizes if size > 1 for length in (size, size + 1, 2 * size)]
    most = [] if subject.max_length is None else [min(subject.max_length, LONGEST)]
    usual = [length for length in near if length <= max(USUAL_LENGTHS)]
    longest = TEXT_OUTPUTS // subject.output_width
    return sorted({n for n in subject.lengths(*USUAL_LENGTHS, *usual, *most) if 2 <= n <= longest})


def _setting_points(subject: Subject, settings: Iterable[Setting]) -> Iterator[Point]:
    """Two exchanges in each setting, before and after in batches of their own: a batch may share what it leaks."""
    leaks = False
    for (dtype, training), some in groupby(settings, key=lambda setting: (setting.dtype, setting.training)):
        model = subject.copy(dtype).train(training)
        for setting in some:
            with setting.autocast():  # left before anything else is told
                points = list(_exchanges(subject, model, setting, leaks))
            for point in points:
                leaks = leaks or point.leak is not None
                yield point


def _exchanges(subject: Subject, model: nn.Module, setting: Setting, leaks: bool) -> Iterator[Point]:
    """At two cuts of one text; of a model that is known to leak, no movement is asked whether it is rounding."""
    inputs = setting.inputs(subject)
    try:
        before = read(model, inputs)
    except RuntimeError as error:
        if setting.dtype == torch.float64:
            raise
        name = str(setting.dtype).removeprefix("torch.")  # there are operations that exist in wider types only
        yield Point(setting.length, untested=f"{name}, which raises {type(error).__name__}")
        return
    if before.outputs is not None:
        _assert_finite(before.outputs)
    for cut in sorted({(setting.length // 2) | 1, setting.length - 1} - {setting.length}):
        later = _later(inputs, cut)
        changed = with_other_suffix(inputs, later, subject.other_ids(inputs["input_ids"]))
        if before.outputs is not None:
            moved = movement(before.outputs, outputs_of(model, changed)).amax(0)  # [T]
            seeing = (~(moved[:cut] <= _limit(moved, before.outputs, cut))).nonzero()
            leak = None
            if len(seeing) and (leaks or _stands_out(subject, model, inputs, cut)):
                leaks, position = True, int(seeing[0])
                size = (moved[position] / moved[cut:].max()).item()
                leak = Leak(position, cut - position, size, f"other tokens from {cut} on, {setting}")
            yield Point(setting.length, leak)
        if before.loss is not None:
            yield Point(setting.length, _loss_leak(model, setting, cut, inputs, changed, later))


def _loss_leak(
    model: nn.Module, setting: Setting, cut: int, inputs: dict[str, Any], changed: dict[str, Any], later: torch.Tensor
) -> Leak | None:
    """What the loss of the tokens before a cut shows, where the suffix is exchanged and has no labels."""
    before, after = prefix_losses(model, inputs, changed, later)
    size = abs(after - before) / max(abs(before), 1e-6)
    if size <= LOSSES[setting.precision]:
        return None
    return Leak(cut - 1, 1, size, f"the loss of what stands before {cut}, {setting}")


def _later(inputs: dict[str, Any], cut: int) -> torch.Tensor:
    ids = inputs["input_ids"]
    return (torch.arange(ids.shape[1]) >= cut).expand_as(ids)


def _limit(moved: torch.Tensor, outputs: torch.Tensor, cut: int) -> torch.Tensor:
    """What outputs may move before a cut, when those after it moved by `moved` `[T]`."""
    return NEGLIGIBLE * moved[cut:].max() + _floor(outputs.dtype, outputs.shape[-1]) * size_of(outputs)


def _floor(dtype: torch.dtype, width: int) -> float:
    """What proves nothing, relative to the outputs; more for few channels, whose mean is less steady."""
    return FLOORS[dtype] * (1 + 3 / width)


def _stands_out(
    subject: Subject, model: nn.Module, inputs: dict[str, Any], cut: int, size: float | None = None
) -> bool:
    """Whether a movement before a cut is more than rounding, again with every one of a few other suffixes.

    Rounding moves outputs as far for a tiny change as for a large one; what a model sees moves them in proportion.
    """
    dtype, precision = next(model.parameters()).dtype, precision_of(model)
    if dtype == torch.float64:
        if subject.tolerance == EXACT:
            return True
        precision = torch.float32  # in which it computes somewhere inside
    ids, later = inputs["input_ids"], _later(inputs, cut)
    real = torch.ones_like(ids) if inputs.get("attention_mask") is None else inputs["attention_mask"]
    rest = {name: x for name, x in inputs.items() if name != "input_ids"}

    def embedded(size: float, salt: int) -> dict[str, Any]:
        return rest | {"inputs_embeds": _moved_embeddings(subject, ids, later, size, salt).to(dtype)}

    for salt in range(10, 10 + DRAWS):
        if size is None:
            pair = inputs, with_other_suffix(inputs, later, _redrawn(subject, ids, salt))
        else:
            pair = embedded(0.0, salt), embedded(size, salt)
        moved, allowed = _moved_before(model, *pair, cut, real)
        rounding = ROUNDING * allowed
        if "inputs_embeds" in subject.arguments:
            rounding, _ = _moved_before(model, embedded(0.0, salt), embedded(TINY[dtype], salt), cut, real)
        if not moved > _floor(precision, subject.output_width) + OVER_ROUNDING * max(1.0, size or 1.0) * rounding:
            return False
    return True


def _redrawn(subject: Subject, ids: torch.Tensor, salt: int) -> torch.Tensor:
    """Other ids than `ids` `[B, T]`, by chance."""
    drawn = subject.ids(len(ids), ids.shape[1], salt)
    return torch.where(drawn == ids, subject.other_ids(ids), drawn)


def _moved_before(
    model: nn.Module, inputs: dict[str, Any], changed: dict[str, Any], cut: int, real: torch.Tensor
) -> tuple[float, float]:
    """How far outputs moved before a cut where tokens are real, and how far after, relative to the largest output."""
    before, after = (outputs_of(model, given) for given in (inputs, changed))
    moved = movement(before, after).amax(0) * (real > 0).any(0)
    scale = size_of(before)
    return (moved[:cut].max() / scale).item(), (moved[cut:].max() / scale).item()


# ---------------------------------------------------------------------------------------------- a suffix, in a batch
def probe_batch(model: nn.Module, inputs: dict[str, Any], half: bool = False) -> Point:
    """Exchange the second half of every text in a batch; nothing before it may move.

    The model runs as it is, in its mode, precision and place, without gradients; buffers are put back. Random numbers
    are drawn.

    Args:
        model: a causal language model, bare or wrapped.
        inputs: what Trainer calls it with: `input_ids` `[B, T]` and whatever else.
        half: whether it computes in half precision.
    """
    ids = inputs.get("input_ids")
    if ids is None or ids.dim() != 2:
        return Point(0, untested="a batch without input_ids of [rows, tokens]")
    mask, length = inputs.get("attention_mask"), ids.shape[1]
    real = mask > 0 if mask is not None and mask.shape == ids.shape else torch.ones_like(ids, dtype=torch.bool)
    count = real.cumsum(1)
    later = real & (count > count[:, -1:] // 2)
    earlier = real & ~later
    known = ids.unique()
    if not earlier.any() or len(known) < 2:
        return Point(length, untested="a batch of texts that are too short to be cut, or of one token only")
    others = known[(torch.searchsorted(known, ids) + 1) % len(known)]
    changed = with_other_suffix(inputs, later, others)
    before = read(model, inputs)
    if before.outputs is not None:
        moved = movement(before.outputs, outputs_of(model, changed)) / size_of(before.outputs)
        seeing = (earlier & (moved > OUTPUTS_IN_BATCHES[half])).nonzero()  # NaN is not look-ahead
        if not len(seeing):
            return Point(length)
        row, position = seeing[0].tolist()
        ahead = int(later[row].nonzero()[0]) - position
        return Point(length, Leak(position, ahead, moved[row, position].item(), "other tokens in a batch of this run"))
    if before.loss is None or inputs.get("labels") is None:
        return Point(length, untested="a batch for which the model gives neither one output per token nor a loss")
    cut = int(later.int().argmax(1).max())
    old, new = prefix_losses(model, inputs, changed, later)
    size = abs(new - old) / max(abs(old), 1e-6)
    leak = Leak(cut - 1, 1, size, "the loss in a batch of this run")
    return Point(length, leak if size > LOSSES_IN_BATCHES[half] else None)


# ---------------------------------------------------------------------------------------------- derivatives, prefixes
def _jacobian_points(subject: Subject, lengths: Sequence[int]) -> Iterator[Point]:
    if "inputs_embeds" not in subject.arguments:
        return
    for length in subject.lengths(*lengths):
        jacobian = influence_of_inputs(subject, length)
        future = jacobian.triu(1) / jacobian.tril().max()
        for position, row in enumerate(future):
            seen = (~(row <= _negligible(subject))).nonzero()
            leak = None
            if len(seen):
                ahead = int(seen[-1]) - position
                leak = Leak(position, ahead, row.max().item(), f"Jacobian of {length} tokens")
            yield Point(length, leak)


def influence_of_inputs(subject: Subject, length: int) -> torch.Tensor:
    """The largest |∂ (a random reading of output t) / ∂ embedding s|, as a table `[t, s]`."""
    x = subject.embed(subject.ids(1, length)).requires_grad_()
    outputs = subject.run(inputs_embeds=x)[0]  # [T, D]
    _assert_finite(outputs)
    reading = torch.randn(outputs.shape[-1], generator=subject.generator(3), dtype=outputs.dtype)
    rows = [torch.autograd.grad(y, x, retain_graph=True)[0][0].abs().amax(-1) for y in outputs @ reading]
    return torch.stack(rows)


def _prefix_points(subject: Subject, together: torch.Tensor, stepwise: torch.Tensor) -> Iterator[Point]:
    scale = together.abs().max()
    difference = (together - stepwise).abs().amax((0, 2)) / scale  # [T]
    for position, size in enumerate(difference.tolist()):
        seeing = not size <= max(subject.tolerance, EXACT)
        leak = Leak(position, 1, size, "the whole text against its prefix") if seeing else None
        yield Point(len(difference), leak)


def _losses(subject: Subject, together: torch.Tensor, stepwise: torch.Tensor) -> tuple[float | None, float | None]:
    """Nats per token of a random text, read at once and by prefixes."""
    if together.shape[-1] != subject.config.get_text_config().vocab_size:
        return None, None
    targets = subject.ids(2, _prefix_length(subject))[:, 1:].flatten()
    at_once, by_prefixes = (F.cross_entropy(y[:, :-1].flatten(0, 1), targets).item() for y in (together, stepwise))
    return at_once, by_prefixes


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
