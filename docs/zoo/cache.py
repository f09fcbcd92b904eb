"""With a cache, whatever it is fed in, a model must give what it gives for the whole text."""

import copy

import torch
from tiny import NEW, SAME, cache_name, cache_of, difference, generate, main, takes, text


def fault(model):
    seen = [generated(model)]
    if cache_name(model):
        seen += [in_pieces(model), second_turn(model)]
    return "; ".join(filter(None, seen))


def in_pieces(model):
    ids = text(1, 24)
    whole = model(input_ids=ids).logits
    seen = []
    for size in (1, 3):
        cache, parts = None, []
        for start in range(0, 24, size):
            given = {} if cache is None else {cache_name(model): cache}
            if takes(model, "cache_position"):
                given["cache_position"] = torch.arange(start, start + size)
            output = model(input_ids=ids[:, start : start + size], use_cache=True, **given)
            parts.append(output.logits)
            cache = cache_of(output)
            if cache is None:
                return ""  # there is nothing to continue from
        moved = difference(whole, torch.cat(parts, 1))
        if not moved <= SAME:
            seen.append(f"fed {size} at a time with the cache, the logits differ by {moved:.1e}")
    return "; ".join(seen)


def generated(model):
    ids = text(1, 12)
    tokens = ids
    for _ in range(NEW):
        tokens = torch.cat([tokens, model(input_ids=tokens).logits[:, -1:].argmax(-1)], 1)
    for use_cache in (False, True):
        if not torch.equal(generate(model, ids, use_cache=use_cache), tokens):
            return f"generate(use_cache={use_cache}) does not give the argmax of forward"
    return ""


def second_turn(model):
    first = generate(model, text(1, 12), return_dict_in_generate=True)
    if cache_of(first) is None:
        return ""
    ids, name = torch.cat([first.sequences, text(1, 5)], 1), cache_name(model)
    fresh = generate(model, ids, use_cache=False)[:, -NEW:]
    tried = []
    # a cache that counts no tokens wants only those that it has not seen
    for what, given in {"the whole text": ids, "what is new": ids[:, -6:]}.items():
        cache = copy.deepcopy(cache_of(first))
        try:
            continued = generate(model, given, **{name: cache})[:, -NEW:]
        except (RuntimeError, ValueError, IndexError) as error:  # the other may be what it wants
            tried.append(f"given {what} it raises {type(error).__name__}")
            continue
        if torch.equal(continued, fresh):
            return ""
        tried.append(f"given {what} it says something else")
    return f"a second turn on the cache of generate() is not one on the text: {', '.join(tried)}"


if __name__ == "__main__":
    main(fault)
