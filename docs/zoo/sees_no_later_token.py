"""The outputs of 20 tokens must not change with the 20 tokens after them."""

import torch
from tiny import SAME, difference, main, text


def fault(model):
    one, other = text(1, 40), text(1, 40)
    other[:, :20] = one[:, :20]
    before, after = (model(input_ids=ids).logits[:, :20] for ids in (one, other))
    moved = difference(before, after)
    return "" if moved <= SAME else f"the logits of 20 tokens move by {moved:.1e} with the 20 tokens after them"


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(fault)
