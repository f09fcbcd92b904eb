"""Padding on the left or right that the mask names must change nothing for the real tokens, nor for what follows."""

import torch
from tiny import SAME, difference, generate, main, takes, text

PADS = 5


def fault(model):
    ids = text(1, 20)
    alone, nothing = model(input_ids=ids).logits, torch.zeros(1, PADS, dtype=torch.long)
    pads, tokens = (nothing, nothing), (ids, torch.ones_like(ids))  # ids and mask
    left, right = (
        tuple(torch.cat(x, 1) for x in zip(*order, strict=True)) for order in ((pads, tokens), (tokens, pads))
    )
    seen = []
    for side, (padded, mask) in {"left": left, "right": right}.items():
        moved = min(difference(alone, logits[mask.bool()][None]) for logits in ways(model, padded, mask))
        if not moved <= SAME:
            seen.append(f"with {PADS} pads on the {side} the logits differ by {moved:.1e}")
    if not hasattr(model, "generate"):  # there are such in version 4
        return "; ".join(seen)
    padded, mask = left
    together, single = generate(model, padded, attention_mask=mask), generate(model, ids)
    if not torch.equal(together[:, PADS:], single):
        seen.append("generate() continues differently after pads on the left")
    return "; ".join(seen)


def ways(model, padded, mask):
    """The logits with the model's own positions, and with those that generate() would make: either may be meant."""
    yield model(input_ids=padded, attention_mask=mask).logits
    if takes(model, "position_ids"):
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
        yield model(input_ids=padded, attention_mask=mask, position_ids=positions).logits


if __name__ == "__main__":
    main(fault)
