"""The outputs of 20 tokens must not change with the 20 tokens after them."""

from tiny import difference, main, text

ROUNDING = 1e-5  # both texts are of one shape, so that there is hardly any


def fault(model):
    one, other = text(1, 40), text(1, 40)
    other[:, :20] = one[:, :20]
    before, after = (model(input_ids=ids).logits[:, :20] for ids in (one, other))
    moved = difference(before, after)
    return "" if moved <= ROUNDING else f"the logits of 20 tokens move by {moved:.1e} with the 20 tokens after them"


if __name__ == "__main__":
    main(fault)
