"""generate() in its modes: what the cache makes faster it must not change.

All in float64, so that no tie is broken by rounding, and with an output matrix of its own: random weights whose output
matrix is the embedding matrix tend to repeat one token forever, which would prove little.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationConfig

from .checks import Violation, assert_same, check
from .quiet import quiet
from .subject import CACHE_NAMES, Subject, perturb, tokens_in

GREEDY = {"do_sample": False}
BEAMS = {"do_sample": False, "num_beams": 3}
BEAM_MODES: dict[str, dict[str, Any]] = {
    "beam search": {**BEAMS, "num_return_sequences": 3},
    "beam sampling": {"do_sample": True, "num_beams": 2, "temperature": 1.5},
}
SAMPLING_MODES: dict[str, dict[str, Any]] = {
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 0},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
}
LONGEST = 12  # tokens of a prompt, and of what is generated from it
NO_REORDERING = "neither the cache has reorder_cache nor the model _reorder_cache"
ORDER = [2, 0, 0]  # rows that survive in beam search: one is dropped, one goes twice


# ---------------------------------------------------------------------------------------------- one prompt
@check("generation", "generation")
def greedy_decoding(subject: Subject) -> str:
    """Greedy decoding, with a cache and without, is the argmax of forward over the growing text."""
    speaker, ids = Speaker(subject), subject.ids(2, unit(subject))
    expected = ids
    with torch.no_grad():
        for _ in range(unit(subject)):
            logits = speaker.model(input_ids=expected, **_without_cache(subject)).logits[:, -1:]
            expected = torch.cat([expected, logits.float().argmax(-1)], 1)  # float32 as in generate()
    for use_cache, how in ((False, "without a cache"), (True, "with a cache")):
        generated = speaker.generate(ids, use_cache=use_cache)
        _assert_tokens(generated, expected, f"greedy decoding {how} is not the argmax of forward")
    return _variety(expected[:, ids.shape[1] :])


@check("generation", "generation", "cache")
def sampling_from_the_cache(subject: Subject) -> str:
    """Sampling with a seed gives the same tokens with a cache as without."""
    return _same_without_cache(subject, SAMPLING_MODES)


@check("generation", "generation", "cache")
def beam_search_from_the_cache(subject: Subject) -> str:
    """Beam search and beam sampling give the same with a cache as without: the cache is reordered with the beams."""
    fault = _reordering_fault(subject)
    if fault and fault != NO_REORDERING:  # a model may get its beams right in another way
        raise Violation(f"the cache is not reordered with the beams: {fault}")
    try:
        return _same_without_cache(subject, BEAM_MODES)
    except Violation as violation:
        if fault:
            raise Violation(f"the cache is not reordered with the beams: {fault}; {violation}") from violation
        raise


@check("generation", "generation", "attention_mask")
def left_padded_batch(subject: Subject) -> str:
    """A left-padded batch generates what its rows generate alone, greedily and with beams."""
    speaker, longest = Speaker(subject), unit(subject)
    rows = [subject.ids(1, length, salt=length) for length in (longest, longest * 3 // 5, max(1, longest // 4))]
    pads = [longest - row.shape[1] for row in rows]
    ids = torch.cat([F.pad(row, (pad, 0), value=_pad_id(subject)) for row, pad in zip(rows, pads, strict=True)])
    mask = (torch.arange(longest) >= torch.tensor(pads)[:, None]).long()
    cause = "the attention_mask is ignored: " if _ignores(subject, ids, mask) else ""
    for mode, options in (("greedy decoding", GREEDY), ("beam search", BEAMS)):
        together = speaker.generate(ids, attention_mask=mask, **options)[:, longest:]
        for row, pad, tokens in zip(rows, pads, together, strict=True):
            alone = speaker.generate(row, **options)[:, row.shape[1] :]
            what = f"{cause}{mode} after {pad} tokens of left padding differs from the row alone"
            _assert_tokens(tokens[None], alone, what)
    return _variety(together)


@check("generation", "inputs_embeds", "generation from embeddings")
def generation_from_embeddings(subject: Subject) -> str:
    """inputs_embeds generate what their input_ids generate."""
    speaker, ids = Speaker(subject), subject.ids(2, unit(subject))
    expected = speaker.generate(ids)[:, ids.shape[1] :]
    generated = speaker.generate(ids, embedded=True)
    _assert_tokens(generated, expected, "generation from inputs_embeds differs from input_ids")
    return _variety(expected)


# ---------------------------------------------------------------------------------------------- several turns
@check("generation", "generation", "cache")
def continuation_from_a_returned_cache(subject: Subject) -> str:
    """A second turn of 1 or 5 new tokens on the cache of the first is as one on the whole text."""
    speaker, new = Speaker(subject), unit(subject)
    for turn in sorted({1, min(5, new)}):
        first = speaker.generate(subject.ids(2, new), return_dict_in_generate=True)
        cache = next((first[name] for name in CACHE_NAMES if first.get(name) is not None), None)
        if cache is None:
            raise Violation("generate() returns no cache to continue from")
        ids = torch.cat([first.sequences, subject.ids(2, turn, salt=1)], 1)
        # by the tokens that a cache counts, generate() skips what it has seen; some caches count none
        unseen = ids[:, -turn - 1 :] if tokens_in(cache) is None else ids
        continued = speaker.generate(unseen, **{str(subject.cache_name): cache})[:, -new:]
        expected = speaker.generate(ids, use_cache=False)[:, -new:]
        _assert_tokens(continued, expected, f"a turn of {turn} new tokens on the returned cache differs")
    return _variety(expected)


# ---------------------------------------------------------------------------------------------- roll back
@check("generation", "generation", "cache", "rollback")
def assisted_decoding(subject: Subject) -> str:
    """Drafts of an assistant change no token, whether it is always right or mostly wrong."""
    speaker, ids = Speaker(subject), subject.ids(1, unit(subject))
    expected = speaker.generate(ids)
    wrong = perturb(Speaker(subject).model, subject.seed + 1)
    for weights, assistant in (("the same weights", Speaker(subject).model), ("other weights", wrong)):
        assisted = speaker.generate(ids, assistant_model=assistant)
        _assert_tokens(assisted, expected, f"decoding with an assistant of {weights} is not greedy decoding")
    return _variety(expected[:, ids.shape[1] :])


@check("generation", "generation", "cache", "rollback")
def prompt_lookup(subject: Subject) -> str:
    """Drafts that are looked up in the prompt change no token."""
    speaker, length = Speaker(subject), 2 * unit(subject)
    ids = subject.ids(1, unit(subject) // 2).repeat(1, 4)  # repetition, so that there is something to look up
    expected = speaker.generate(ids, max_new_tokens=length)
    # transformers 4.57 looks nothing up without an end token: one that is never said
    end = next((i for i in subject.vocabulary.tolist() if i not in expected), _pad_id(subject))
    generated = speaker.generate(ids, max_new_tokens=length, eos_token_id=end, prompt_lookup_num_tokens=4)
    generated = generated[:, : expected.shape[1]]  # it may run a token over the limit
    _assert_tokens(generated, expected, "decoding with prompt lookup is not greedy decoding")
    return _variety(expected[:, ids.shape[1] :])


@check("generation", "generation", "cache", "rollback")
def taking_tokens_back(subject: Subject) -> str:
    """After cache.crop, what follows is as if the last tokens had never been fed; a cache that cannot do it refuses."""
    kept, draft = subject.ids(2, unit(subject)), subject.ids(2, min(5, unit(subject)), salt=1)
    token = subject.ids(2, 1, salt=2)
    remark = "crop refuses"
    for drop in sorted({1, (draft.shape[1] + 1) // 2, draft.shape[1]}):
        left = draft.shape[1] - drop
        expected = subject.feed([kept, draft[:, :left], token] if left else [kept, token])[0][:, -1:]
        # transformers 4.57 names the length to keep, transformers 5 the tokens to drop
        for argument, record in ((kept.shape[1] + left, True), (-drop, True), (-drop, False)):
            _, cache = subject.feed([kept])
            recording = record and hasattr(cache, "activate_past_recording")
            if recording:
                cache.activate_past_recording()
            subject.feed([draft], cache)
            try:
                cache.crop(argument)
            except (ValueError, RuntimeError) as refusal:
                if recording and argument < 0:
                    raise Violation(f"crop({argument}) is refused after recording: {refusal}") from refusal
                continue
            got, _ = subject.feed([token], cache)
            what = f"crop({argument}) does not take {drop} of {draft.shape[1]} tokens back"
            remark = assert_same(got, expected, what, subject.tolerance, where=("row",))
    return remark


# ---------------------------------------------------------------------------------------------- generating
class Speaker:
    """A float64 copy of a subject's model with an output matrix of its own, and no options but ours."""

    def __init__(self, subject: Subject) -> None:
        self.model: Any = subject.copy().requires_grad_(False)
        self._masks = "attention_mask" in subject.arguments
        head: Any = self.model.get_output_embeddings()
        if head is not None and head.weight is self.model.get_input_embeddings().weight:
            tied: torch.Tensor = head.get_parameter("weight")
            noise = torch.randn(tied.shape, generator=subject.generator(5), dtype=tied.dtype)
            head.weight = nn.Parameter(noise * tied.std(), requires_grad=False)
        options = {"pad_token_id": _pad_id(subject), "max_new_tokens": unit(subject)}
        self.model.generation_config = GenerationConfig(**options)

    @torch.no_grad()
    def generate(self, ids: torch.Tensor, embedded: bool = False, **options: Any) -> Any:
        """generate() after `ids` `[B, T]`, or after their embeddings; greedy unless the options say otherwise.

        Every token of the prompt counts unless a mask is given, nothing ends the text early, and random numbers start
        from the same seed each time.
        """
        torch.manual_seed(0)
        prompt = {"inputs_embeds": self.model.get_input_embeddings()(ids)} if embedded else {"input_ids": ids}
        mask = {"attention_mask": torch.ones_like(ids)} if self._masks else {}
        with quiet():
            return self.model.generate(**prompt, **{**mask, **GREEDY, **options})


def unit(subject: Subject) -> int:
    """Tokens of a prompt, and of an answer: five of these fit into any model that takes positions."""
    return LONGEST if subject.max_length is None else max(2, min(LONGEST, subject.max_length // 5))


def _pad_id(subject: Subject) -> int:
    """The padding id, or any other: with a mask it does not matter."""
    pad = getattr(subject.config.get_text_config(), "pad_token_id", None)
    return 0 if pad is None or pad < 0 else pad


def _without_cache(subject: Subject) -> dict[str, bool]:
    return {"use_cache": False} if "use_cache" in subject.arguments else {}


# ---------------------------------------------------------------------------------------------- comparing
def _same_without_cache(subject: Subject, modes: dict[str, dict[str, Any]]) -> str:
    speaker, ids = Speaker(subject), subject.ids(2, unit(subject))
    for mode, options in modes.items():
        expected = speaker.generate(ids, use_cache=False, **options)
        _assert_tokens(speaker.generate(ids, **options), expected, f"{mode} with a cache differs from without")
    return _variety(expected[:, ids.shape[1] :])


def _assert_tokens(got: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Raise [`Violation`] at the first token `[B, T]` that differs, or if there are more or fewer."""
    common = min(got.shape[1], expected.shape[1])
    wrong = (got[:, :common] != expected[:, :common]).nonzero().tolist()
    if wrong:
        row, position = min(wrong, key=lambda place: place[1])
        tokens = f"token {got[row, position]} instead of {expected[row, position]}"
        raise Violation(f"{what}: first at row {row}, position {position} ({tokens}); {len(wrong)} tokens differ")
    if got.shape != expected.shape:
        raise Violation(f"{what}: there are {got.shape[1]} tokens instead of {expected.shape[1]}")


@torch.no_grad()
def _ignores(subject: Subject, ids: torch.Tensor, mask: torch.Tensor) -> bool:
    """Whether the mask `[B, T]` makes no difference: the next token is the same without it."""
    inputs = subject.masked(mask)
    masked = subject.run(ids, **inputs)[:, -1]
    return torch.equal(masked, subject.run(ids, **(inputs | {"attention_mask": torch.ones_like(mask)}))[:, -1])


def _variety(said: torch.Tensor) -> str:
    """How many different tokens were said `[B, T]`: a model that says only one proves little."""
    different = said.unique().numel()
    return f"{said.numel()} tokens, {different} different" if different > 1 else "the model says one token only"


@torch.no_grad()
def _reordering_fault(subject: Subject) -> str | None:
    """What goes wrong when the rows of a cache move, or None: every row must continue from its own past."""
    ids, token = subject.ids(len(ORDER), unit(subject), salt=3), subject.ids(len(ORDER), 1, salt=4)
    _, cache = subject.feed([ids])
    # against another cache: that pieces give what the whole text gives is not the question here
    unmoved, expected = (subject.feed([rows, token])[0][:, -1] for rows in (ids, ids[ORDER]))  # [B, V]
    if hasattr(subject.model, "_reorder_cache"):
        model: Any = subject.model
        cache = model._reorder_cache(cache, torch.tensor(ORDER))
    elif hasattr(cache, "reorder_cache"):
        cache.reorder_cache(torch.tensor(ORDER))
    else:
        return NO_REORDERING
    got = subject.feed([token], cache)[0][:, -1]
    try:
        assert_same(got, expected, f"rows {ORDER} continue from another past", subject.tolerance, where=("row",))
    except Violation as violation:
        stayed = (got - unmoved).abs().max() <= subject.tolerance * unmoved.abs().max()
        return "reorder_cache leaves the rows in place" if stayed else str(violation)
    return None
