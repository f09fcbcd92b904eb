"""What must not change a model's results: how a text is cut, padded, packed or batched, and how it is computed."""

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from .checks import Violation, assert_same, check
from .subject import Subject, tokens_in

CUTTINGS = {  # pieces on and next to the borders of the usual chunks
    "2+1+3": (2, 1, 3),
    "10+1+1+8+13": (10, 1, 1, 8, 13),
    "1+39": (1, 39),
    "40 single tokens": (1,) * 40,
    "20+20 single tokens": (20,) + (1,) * 20,
    "65+5": (65, 5),
    "63+1+1+64": (63, 1, 1, 64),
}
LENGTH = 70  # over the borders of chunks of 16, 32 and 64
PADDING = 9
DOCUMENTS = (5, 64, 1, 63, 1, 1, 20)
PACKED_CUTS = ((64, 64, 27), (5, 64, 86), (70, 1, 1, 83))
REPEATED = 1e-12
GRADIENT_COSINE = 0.9  # measured on honest models: 0.97 and more
HALF_TOLERANCES = {torch.bfloat16: 0.1, torch.float16: 0.02}  # relative error of all outputs, for two layers
TWIN_TOLERANCE = 1e-9
POSITION = ("position",)
FOREIGN = ("cache_params", "past", "inputs_ids", "token_types")  # no forward of these models knows them
FLOAT32_LOSS = 1e-5  # transformers computes losses in float32


# ---------------------------------------------------------------------------------------------- cutting
@check("equivalence", "text", "cache", "token outputs")
def any_chunking(subject: Subject) -> str:
    """Fed in pieces through the cache, a text gives what it gives at once, wherever it is cut."""
    cuttings = {name: sizes for name, sizes in CUTTINGS.items() if subject.lengths(sum(sizes))}
    remark, faults = "", {}
    for name, sizes in cuttings.items():
        try:
            remark = _feed_in_pieces(subject, name, sizes)
        except Violation as violation:
            faults[name] = str(violation)
    if faults:
        single = all(max(sizes[1:]) == 1 for name, sizes in cuttings.items() if name not in faults)
        several = all(max(sizes[1:]) > 1 for name, sizes in cuttings.items() if name in faults)
        what = "a continuation with more than one token is wrong: " if single and several else ""
        raise Violation(what + next(iter(faults.values())))
    return remark


def _feed_in_pieces(subject: Subject, name: str, sizes: Sequence[int]) -> str:
    ids = subject.ids(2, sum(sizes))
    expected, what = subject.run(ids), f"feeding in pieces {name} changes the output"
    try:
        got, cache = subject.feed(ids.split(sizes, 1))
    except (RuntimeError, ValueError, IndexError) as error:
        raise Violation(f"feeding in pieces {name} raises {type(error).__name__}: {error}") from error
    counted = tokens_in(cache)
    if counted not in (None, sum(sizes)):
        raise Violation(f"after pieces {name} the cache counts {counted} tokens, not {sum(sizes)}")
    return assert_same(got, expected, what, subject.tolerance)


# ---------------------------------------------------------------------------------------------- padding
@check("equivalence", "text", "attention_mask", "token outputs")
def left_padding(subject: Subject) -> str:
    """Padding on the left changes nothing for real tokens."""
    mask = [0] * PADDING + [1] * _length(subject, PADDING)
    if "packing" in subject.features:  # positions would begin a new document after the pads, and so hide them
        _pad(subject, mask, "padding on the left, without position_ids,", None)
    return _pad(subject, mask, "padding on the left")


@check("equivalence", "text", "attention_mask", "token outputs")
def right_padding(subject: Subject) -> str:
    """Padding on the right changes nothing for real tokens."""
    return _pad(subject, [1] * _length(subject, PADDING) + [0] * PADDING, "padding on the right")


@check("equivalence", "text", "attention_mask", "pooled output")
def padding_of_whole_texts(subject: Subject) -> str:
    """Padding on the right changes nothing for the one output of a text."""  # some heads read the first position
    return _pad(subject, [1] * _length(subject, PADDING) + [0] * PADDING, "padding on the right")


@check("equivalence", "text", "attention_mask", "packing")
def padding_anywhere(subject: Subject) -> str:
    """Padding on both sides and in holes changes nothing for real tokens, whatever positions the pads have."""
    rest = [1] * (_length(subject, PADDING) - 4)
    remark = _pad(subject, [0] * 4 + [1] * 4 + rest + [0] * 5, "padding on both sides")
    for at_pads in (0, 1):  # releases of transformers differ in the position that they give to pads
        holes = [1] * 3 + [0] * 2 + [1] + [0] * 7 + rest
        remark = _pad(subject, holes, f"padding in holes, with position {at_pads} at pads,", at_pads)
    return remark


@check("equivalence", "text", "attention_mask", "token outputs")
def rows_with_different_padding(subject: Subject) -> str:
    """Rows of one batch with different padding give what each gives alone."""
    length = _length(subject)
    ids, lefts = subject.ids(3, length), (0, 5, length - 4)
    mask = (torch.arange(length) >= torch.tensor(lefts)[:, None]).long()
    outputs = subject.run(ids, **subject.masked(mask))
    for row, left in enumerate(lefts):
        what = f"{left} pads on the left, in a batch with other padding, change the output of a row"
        expected = subject.run(ids[row, None, left:])[0]
        remark = assert_same(outputs[row, left:], expected, what, subject.tolerance, POSITION)
    return remark


@check("equivalence", "text", "attention_mask", "cache", "token outputs")
def continuation_after_padding(subject: Subject) -> str:
    """A padded prompt leaves the cache of the bare one: what follows is the same."""
    ids, following = subject.ids(1, 20), subject.ids(1, 6, 1)
    masks = {"on the left": [0] * 5 + [1] * 20}
    if "packing" in subject.features:
        masks |= {"on the right": [1] * 20 + [0] * 5, "in a hole": [1] * 8 + [0] * 5 + [1] * 12}
    expected = subject.run(torch.cat([ids, following], 1))[:, 20:]
    for where, marks in masks.items():
        mask = torch.tensor([marks])
        turns = [_spread(subject, ids, mask), following]
        inputs = subject.masked(torch.cat([mask, torch.ones_like(following)], 1))
        what = f"padding the prompt {where} changes what follows through the cache"
        remark = _assert_same_with_mask(subject, partial(_last_turn, subject, turns), inputs, expected, what)
    return remark


@check("equivalence", "text", "attention_mask", "cache", "token outputs", "packing")
def second_turns_of_different_length(subject: Subject) -> str:
    """Two conversations in a batch, each turn padded on the left to the longer one, continue as each does alone."""
    lengths = ((12, 9), (5, 8))  # of both rows, in the first and in the second turn
    ids = [subject.ids(2, max(pair), turn) for turn, pair in enumerate(lengths)]
    masks = [(torch.arange(max(pair)) >= max(pair) - torch.tensor(pair)[:, None]).long() for pair in lengths]
    got = _last_turn(subject, ids, **subject.masked(torch.cat(masks, 1)))
    for row in range(2):
        real = torch.cat([turn[row, mask[row].bool()] for turn, mask in zip(ids, masks, strict=True)])
        count = lengths[1][row]
        what = f"padding the second turn changes conversation {row}"
        remark = assert_same(got[row, -count:], subject.run(real[None])[0, -count:], what, subject.tolerance, POSITION)
    return remark


def _last_turn(subject: Subject, turns: Sequence[torch.Tensor], **inputs: Any) -> torch.Tensor:
    """Output of the last of several turns `[B, T_i]` fed through the cache, as generate() would feed them."""
    cache, start = None, 0
    for turn in turns:
        end = start + turn.shape[1]
        first = {name: 0 if name == "attention_mask" else start for name in inputs}
        part: dict[str, Any] = {name: x[:, first[name] : end] for name, x in inputs.items()}
        output, cache = subject.advance(turn, cache, start, **part)
        start = end
    return output


def _pad(subject: Subject, marks: list[int], what: str, at_pads: int | None = 1) -> str:
    """Compare real tokens of padded rows with those of the bare text; `at_pads`: position of pads (None: no ids)."""
    mask = torch.tensor([marks] * 2)
    ids = subject.ids(2, int(mask[0].sum()))
    padded, inputs = _spread(subject, ids, mask), subject.masked(mask)
    if at_pads is None:
        inputs = {"attention_mask": mask}
    elif "position_ids" in inputs:
        inputs["position_ids"] = inputs["position_ids"].masked_fill(mask == 0, at_pads)

    def of_real_tokens(**inputs: Any) -> torch.Tensor:
        output = subject.run(padded, **inputs)
        return output if "pooled output" in subject.features else output[mask.bool()].unflatten(0, ids.shape)

    return _assert_same_with_mask(subject, of_real_tokens, inputs, subject.run(ids), f"{what} changes the output")


def _assert_same_with_mask(
    subject: Subject,
    compute: Callable[..., torch.Tensor],
    inputs: dict[str, torch.Tensor],
    expected: torch.Tensor,
    what: str,
) -> str:
    """`assert_same` for `compute(**inputs)`, that says so if the mask among the inputs makes no difference."""
    got = compute(**inputs)
    try:
        return assert_same(got, expected, what, subject.tolerance)
    except Violation as violation:
        unmasked = inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])}
        if torch.equal(got, compute(**unmasked)):
            raise Violation(f"the attention_mask is ignored: {violation}") from violation
        raise


def _spread(subject: Subject, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`ids` `[B, T]` at the places `[B, L]` where `mask` is 1, and elsewhere what padding must keep unseen.

    A head that pools may find the end of the text by its pad token, so it gets that one.
    """
    pooled = "pooled output" in subject.features
    junk: Any = subject.config.get_text_config().pad_token_id if pooled else subject.vocabulary[0].item()
    return torch.full(mask.shape, junk).masked_scatter(mask.bool(), ids)


def _length(subject: Subject, spare: int = 0) -> int:
    """`LENGTH`, or less for a model that takes no `LENGTH + spare` tokens."""
    return LENGTH if subject.max_length is None else min(LENGTH, subject.max_length - spare)


# ---------------------------------------------------------------------------------------------- packing and batches
@check("equivalence", "text", "packing", "token outputs")
def packed_documents(subject: Subject) -> str:
    """Documents in one row give what each gives alone, cut anywhere through the cache too."""
    documents = [subject.ids(1, length, salt) for salt, length in enumerate(DOCUMENTS)]
    ids = torch.cat(documents, 1)
    expected = torch.cat([subject.run(document) for document in documents], 1)
    starts: dict[str, Any] = {
        "position_ids": torch.cat([torch.arange(length) for length in DOCUMENTS])[None],
        "seq_idx": torch.arange(len(DOCUMENTS)).repeat_interleave(torch.tensor(DOCUMENTS))[None],
    }
    starts = {name: borders for name, borders in starts.items() if name in subject.arguments}
    remark = "forward names neither position_ids nor seq_idx"
    for name, borders in starts.items():
        got = subject.run(ids, **{name: borders})
        if torch.equal(got, subject.run(ids)):
            raise Violation(f"{name} is ignored: packed documents see each other")
        remark = assert_same(got, expected, f"packing documents by {name} changes the output", subject.tolerance)
        for sizes in PACKED_CUTS if "cache" in subject.features else ():
            got, _ = subject.feed(ids.split(sizes, 1), **{name: borders})
            what = f"packing documents by {name}, fed in pieces {'+'.join(map(str, sizes))}, changes the output"
            assert_same(got, expected, what, subject.tolerance)
    return remark


@check("equivalence", "text", "packing", "token outputs", "position_ids")
def rows_packed_independently(subject: Subject) -> str:
    """Documents may begin at other places in every row of a batch."""
    ids, borders = subject.ids(2, 12), (5, 9)
    positions = torch.stack([torch.cat([torch.arange(border), torch.arange(12 - border)]) for border in borders])
    outputs = subject.run(ids, position_ids=positions)
    for row, border in enumerate(borders):
        expected = torch.cat([subject.run(part) for part in ids[row, None].split((border, 12 - border), 1)], 1)
        what = f"packing changes row {row} of a batch with other borders in every row"
        remark = assert_same(outputs[row], expected[0], what, subject.tolerance, POSITION)
    return remark


@check("equivalence")
def rows_of_a_batch(subject: Subject) -> str:
    """Rows do not touch each other: a batch gives what its rows give alone."""
    inputs = subject.inputs(3, _length(subject))
    together = subject.run(**inputs)
    if len(together) != len(next(iter(inputs.values()))):
        return "its output has no rows"
    alone = torch.cat([subject.run(**{k: x[row, None] for k, x in inputs.items()}) for row in range(len(together))])
    return assert_same(together, alone, "the other rows of the batch change a row", subject.tolerance)


# ---------------------------------------------------------------------------------------------- arguments
@check("equivalence", "text", "inputs_embeds")
def inputs_embeds(subject: Subject) -> str:
    """Input embeddings in place of their ids give the same."""
    ids = subject.ids(2, _length(subject))
    got = subject.run(inputs_embeds=subject.embed(ids))
    return assert_same(got, subject.run(ids), "inputs_embeds give other outputs than their ids", subject.tolerance)


@check("equivalence", "generation", "labels")
def loss(subject: Subject) -> str:
    """The loss is the cross entropy of every logit with the next label, and -100 is not counted."""
    ids = subject.ids(2, 40)
    labels = ids.clone()
    labels[:, 10:20] = -100
    logits = subject.run(ids)
    for name, wanted in {"": ids, " with labels of -100": labels}.items():
        got = subject.model(input_ids=ids, labels=wanted).loss
        expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), wanted[:, 1:].flatten())
        unshifted = F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        what = f"the loss{name} is not the cross entropy of logits with the next labels"
        if abs(got - unshifted) < abs(got - expected):
            what += ": the labels are not shifted"
        remark = assert_same(got, expected, what, FLOAT32_LOSS)
    return remark


@check("equivalence", "strict_arguments")
def unknown_arguments(subject: Subject) -> str:
    """An argument that is misspelt or foreign raises an error that names it, and what forward names is taken."""
    inputs = subject.inputs(2, 8)
    given: dict[str, Any] = {"use_cache": False, "output_hidden_states": True, "return_dict": True}
    if "text" in subject.features:
        given["attention_mask"] = torch.ones_like(inputs["input_ids"])
        given["position_ids"] = torch.arange(8).expand_as(inputs["input_ids"])
    subject.model(**inputs, **{name: value for name, value in given.items() if name in subject.arguments})
    names = [*FOREIGN, *(name[:-1] for name in subject.arguments), "output_attentions"]
    documented = any("output_attentions" in (vars(c)["forward"].__doc__ or "") for c in _forward_classes(subject))
    names = [n for n in names if n not in subject.arguments and not (n == "output_attentions" and documented)]
    for name in sorted(names):
        value = True if name == "output_attentions" else next(iter(inputs.values()))
        try:
            subject.model(**inputs, **{name: value})
        except (TypeError, ValueError) as error:
            if name not in str(error):
                raise Violation(f"the error for the unknown argument {name!r} does not name it: {error}") from error
        else:
            raise Violation(f"the unknown argument {name!r} is swallowed")
    return f"{len(names)} unknown arguments are refused"


def _forward_classes(subject: Subject) -> list[type]:
    return [cls for cls in subject.model_class.__mro__ if "forward" in vars(cls)]


@check("equivalence", "text", "logits_to_keep", "token outputs")
def logits_to_keep(subject: Subject) -> str:
    """Logits for some positions only are those of all positions, there."""
    ids, places = subject.ids(2, 20), torch.tensor([3, 11, 12])
    logits = subject.run(ids)
    wanted: list[tuple[Any, torch.Tensor]] = [(1, logits[:, -1:]), (5, logits[:, -5:]), (places, logits[:, places])]
    for keep, expected in wanted:
        name = keep if isinstance(keep, int) else keep.tolist()
        got = subject.run(ids, logits_to_keep=keep)
        remark = assert_same(got, expected, f"logits_to_keep={name} gives other logits", subject.tolerance)
    return remark


@check("equivalence", "text")
def resized_embeddings(subject: Subject) -> str:
    """More embeddings leave the old logits as they are, tied weights tied, and a finite loss for new ids."""
    model, ids = subject.copy(), subject.ids(2, 20)
    expected, size = subject.run(ids), _embeddings(model)
    tied = _tied(model)
    model.resize_token_embeddings(size + 3, mean_resizing=False)
    got_size, config_size = _embeddings(model), model.config.get_text_config().vocab_size
    if (got_size, config_size) != (size + 3, size + 3):
        raise Violation(f"resized to {size + 3}, there are {got_size} embeddings, and the config says {config_size}")
    if _tied(model) != tied:
        raise Violation(f"resizing the embeddings {'unties' if tied else 'ties'} input and output")
    got = subject.run(ids, model=model)
    if expected.shape[-1] == size:  # scores of all tokens, whether a matrix of their own gives them or not
        if got.shape[-1] != size + 3:
            raise Violation(f"after resizing to {size + 3} there are {got.shape[-1]} logits")
        got = got[..., :size]
    remark = assert_same(got, expected, "resizing the embeddings changes the output for old ids", subject.tolerance)
    new = subject.run(torch.full_like(ids, size + 2), model=model)
    if not torch.isfinite(new).all():
        raise Violation("the output for a new id is not finite")
    return remark


def _embeddings(model: PreTrainedModel) -> int:
    layer: Any = model.get_input_embeddings()
    return layer.num_embeddings


def _tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


# ---------------------------------------------------------------------------------------------- the same again
@check("equivalence")
def same_weights_from_the_same_seed(subject: Subject) -> str:
    """A new model of one config and seed has the same weights every time."""
    weights = []
    for _ in range(2):
        torch.manual_seed(subject.seed)
        weights.append(subject.model_class(copy.deepcopy(subject.config)).state_dict())
    for name, first in weights[0].items():
        if not torch.equal(first, weights[1][name]):
            raise Violation(f"two models of one config and seed differ in {name}")
    return f"{len(weights[0])} tensors"


@check("equivalence")
def same_results_again(subject: Subject) -> str:
    """The same outputs twice, and in training the same gradients with the same seed."""
    inputs = _inputs(subject)
    remark = assert_same(subject.run(**inputs), subject.run(**inputs), "a second run gives other outputs", REPEATED)
    model = subject.copy().train()
    first, second = (gradients(subject, model, inputs) for _ in range(2))
    assert_same_gradients(first, second, "a second training step with the same seed gives other gradients", REPEATED)
    return remark


@check("equivalence")
def gradient_of_every_parameter(subject: Subject) -> str:
    """Every trainable parameter gets a finite gradient."""
    found = gradients(subject, subject.copy(), _inputs(subject))
    there = {name: gradient for name, gradient in found.items() if gradient is not None and gradient.any()}
    without = [name for name in found if name not in there]
    if without:
        raise Violation(f"{len(without)} of {len(found)} parameters get no gradient: {', '.join(without[:5])}")
    wrong = [name for name, gradient in there.items() if not torch.isfinite(gradient).all()]
    if wrong:
        raise Violation(f"{len(wrong)} of {len(found)} gradients are not finite: {', '.join(wrong[:5])}")
    return f"{len(found)} parameters"


@check("equivalence", "gradient checkpointing")
def gradient_checkpointing(subject: Subject) -> str:
    """Computing activations again in the backward pass changes no gradient."""
    model, inputs = subject.copy().train(), _inputs(subject)
    expected = gradients(subject, model, inputs)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    got = gradients(subject, model, inputs)
    return assert_same_gradients(got, expected, "gradient checkpointing changes gradients", subject.tolerance)


def gradients(subject: Subject, model: nn.Module, inputs: dict[str, Any]) -> dict[str, torch.Tensor | None]:
    """Gradients of a random reading of all outputs, for every trainable parameter; None where it needs none."""
    torch.manual_seed(subject.seed)  # for dropout
    use_cache = {"use_cache": False} if "use_cache" in subject.arguments else {}
    outputs = [x for x in tree_leaves(model(**inputs, **use_cache)) if isinstance(x, torch.Tensor) and x.requires_grad]
    return _gradients_of(subject, outputs, {name: p for name, p in model.named_parameters() if p.requires_grad})


def _gradients_of(
    subject: Subject, outputs: Sequence[torch.Tensor], leaves: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor | None]:
    reading: Any = sum((x * _noise_like(subject, x)).sum() for x in outputs)
    return dict(zip(leaves, torch.autograd.grad(reading, list(leaves.values()), allow_unused=True), strict=True))


def assert_same_gradients(
    got: dict[str, torch.Tensor | None], expected: dict[str, torch.Tensor | None], what: str, tolerance: float
) -> str:
    """As `assert_same`, for every parameter; relative to its largest gradient, if that is more than rounding."""
    sizes = {name: 0.0 if x is None else x.abs().max().item() for name, x in expected.items()}
    floor, largest = 1e-4 * max(sizes.values()), 0.0
    for (name, wanted), found in zip(expected.items(), got.values(), strict=True):
        if (wanted is None) != (found is None):
            raise Violation(f"{what}: {name} has {'no' if found is None else 'a'} gradient")
        if wanted is not None and found is not None:
            difference = (found - wanted).abs().max().item() / max(sizes[name], floor)
            if not difference <= tolerance:  # NaN is wrong too
                raise Violation(f"{what}: that of {name} by {difference:.1e} relative, allowed {tolerance:.0e}")
            largest = max(largest, difference)
    return f"largest difference {largest:.0e}"


def _inputs(subject: Subject, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Inputs for one pass over `LENGTH` tokens or steps, or whatever the modality is."""
    inputs = subject.inputs(2, _length(subject))
    return {k: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for k, x in inputs.items()}


def _noise_like(subject: Subject, x: torch.Tensor) -> torch.Tensor:
    return torch.randn(x.shape, generator=subject.generator(4), dtype=torch.float64).to(x)


# ---------------------------------------------------------------------------------------------- fast operations
@check("equivalence", "naive twins")
def fast_operations(subject: Subject) -> str:
    """On the arguments that the model gives them, fast operations equal their naive twins: values and gradients."""
    calls: dict[Any, tuple[FunctionType, dict[str, Any]]] = {}
    with recording(subject, calls):
        _exercise(subject, subject.copy())
    for operation, arguments in calls.values():
        _compare_with_twin(subject, operation, subject.naive_twins[operation], arguments)
    if not calls:
        return "it calls none of the operations with naive twins that are defined next to its layers"
    names = sorted({operation.__name__ for operation, _ in calls.values()})
    return f"{', '.join(names)} ({len(calls)} kinds of calls)"


def _exercise(subject: Subject, model: PreTrainedModel) -> None:
    """Run the model with gradients over whole, padded, packed and continued texts, and over one more token."""
    inputs = _inputs(subject)
    subject.run(model=model, **inputs)
    if "text" not in subject.features:
        return
    ids = inputs["input_ids"]
    if "attention_mask" in subject.arguments:
        mask = (torch.arange(ids.shape[1]) >= torch.tensor([[5], [0]])).long()
        subject.run(ids, model=model, **subject.masked(mask))
    if "packing" in subject.features and "position_ids" in subject.arguments:
        subject.run(ids, model=model, position_ids=torch.arange(ids.shape[1])[None].expand_as(ids) % 33)
    if "cache" in subject.features:
        cache = {str(subject.cache_name): model(input_ids=ids, use_cache=True)[subject.cache_name]}
        for tokens in (34, 1):
            model(input_ids=ids[:, :tokens], use_cache=True, **cache)


@contextmanager
def recording(subject: Subject, calls: dict[Any, tuple[FunctionType, dict[str, Any]]]) -> Iterator[None]:
    """Inside, every operation with a twin that a layer calls is noted, with its arguments by name.

    Of calls that differ in the values of tensors only, such as those of equal layers, the last is kept.
    """

    def recorder(operation: FunctionType) -> Callable:
        signature = inspect.signature(operation)

        def record(*args: Any, **kwargs: Any) -> Any:
            arguments = signature.bind(*args, **kwargs).arguments
            kind = operation, *((n, x.shape if hasattr(x, "shape") else str(x)) for n, x in arguments.items())
            calls[kind] = operation, {name: _leaf(value) for name, value in arguments.items()}
            return operation(*args, **kwargs)

        return record

    places = [
        (module, name, value)
        for module in subject.layer_modules
        for name, value in vars(module).items()
        if isinstance(value, FunctionType) and value in subject.naive_twins
    ]
    try:
        for module, name, operation in places:
            setattr(module, name, recorder(operation))
        yield
    finally:
        for module, name, operation in places:
            setattr(module, name, operation)


def _leaf(value: Any) -> Any:
    """A tensor as a leaf of its own, that asks for a gradient if the value does."""
    return value.detach().clone().requires_grad_(value.requires_grad) if torch.is_tensor(value) else value


def _compare_with_twin(
    subject: Subject, operation: FunctionType, twin: FunctionType, arguments: dict[str, Any]
) -> None:
    known = {name: x for name, x in arguments.items() if name in inspect.signature(twin).parameters}
    got, expected = (tree_leaves(f(**given)) for f, given in ((operation, arguments), (twin, known)))
    what = f"{operation.__name__} differs from its naive twin"
    for number, (fast, naive) in enumerate(zip(got, expected, strict=True)):
        assert_same(fast, naive, f"{what} in output {number}", TWIN_TOLERANCE, ("index",))
    leaves = {name: x for name, x in known.items() if torch.is_tensor(x) and x.requires_grad}
    if leaves:
        fast, naive = (_gradients_of(subject, outputs, leaves) for outputs in (got, expected))
        assert_same_gradients(fast, naive, f"{what} in the gradient", TWIN_TOLERANCE)


# ---------------------------------------------------------------------------------------------- precision
@check("equivalence")
def half_precision(subject: Subject) -> str:
    """Cast to bfloat16 or float16, the model gives what it gives in float32, up to rounding."""
    expected = subject.run(model=subject.copy(torch.float32), **_inputs(subject, torch.float32))
    remarks = []
    for dtype in HALF_TOLERANCES:
        got = subject.run(model=subject.copy(dtype), **_inputs(subject, dtype))
        remarks.append(_rounding_error(got, expected, dtype, "a model in"))
    return ", ".join(remarks)


@check("equivalence")
def autocast(subject: Subject) -> str:
    """Mixed precision gives the outputs and gradients of float32, up to rounding."""
    model, inputs = subject.copy(torch.float32), _inputs(subject, torch.float32)
    expected, expected_gradients = subject.run(model=model, **inputs), gradients(subject, model, inputs)
    remarks = []
    for dtype in HALF_TOLERANCES:
        with torch.autocast("cpu", dtype=dtype):
            got, got_gradients = subject.run(model=model, **inputs), gradients(subject, model, inputs)
        remarks.append(_rounding_error(got, expected, dtype, "autocast to"))
        pairs = [(got_gradients[name], x) for name, x in expected_gradients.items() if x is not None]
        found, wanted = (torch.cat([x.flatten() for x in side]).double() for side in zip(*pairs, strict=True))
        similarity = F.cosine_similarity(found, wanted, dim=0).item()
        if not similarity > GRADIENT_COSINE:
            raise Violation(f"gradients under autocast to {_name(dtype)} point elsewhere: cosine {similarity:.3f}")
    return ", ".join(remarks)


def _rounding_error(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, how: str) -> str:
    finite = torch.isfinite(got)
    if not finite.all():
        raise Violation(f"{how} {_name(dtype)} gives no finite output: first at {(~finite).nonzero()[0].tolist()}")
    error = ((got.double() - expected).norm() / expected.double().norm()).item()
    if error > HALF_TOLERANCES[dtype]:
        allowed = HALF_TOLERANCES[dtype]
        raise Violation(f"{how} {_name(dtype)} changes the output by {error:.1e} relative, allowed {allowed}")
    return f"{_name(dtype)} {error:.0e}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@check("equivalence", "generation", slow=True)
def compiled(subject: Subject) -> str:
    """torch.compile changes neither outputs nor gradients: the graphs that it captures are the model."""
    torch.compiler.reset()  # after too many models in one process it would silently run eagerly
    model, inputs = subject.copy(), _inputs(subject)
    breaks = torch._dynamo.utils.counters["graph_break"]
    breaks.clear()
    fast: Any = torch.compile(model, backend="aot_eager")  # turning graphs into code is slow, and not the model's doing
    got, expected = subject.run(model=fast, **inputs), subject.run(**inputs)
    remark = assert_same(got, expected, "torch.compile changes the output", subject.tolerance)
    found = {name.removeprefix("_orig_mod."): x for name, x in gradients(subject, fast, inputs).items()}
    expected_gradients = gradients(subject, model, inputs)
    assert_same_gradients(found, expected_gradients, "torch.compile changes gradients", subject.tolerance)
    return f"{remark}; {sum(breaks.values())} graph breaks"
