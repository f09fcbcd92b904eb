"""Beam search must find the same text with a cache as without."""

import torch
from tiny import generate, main, text


def fault(model):
    ids = text(2, 12)
    with_cache, without = (generate(model, ids, num_beams=3, use_cache=use) for use in (True, False))
    return "" if torch.equal(with_cache, without) else "beam search with a cache finds another text than without"


if __name__ == "__main__":
    main(fault)
