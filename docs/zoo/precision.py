"""In bfloat16 a model must give about what it gives in float32 with the same weights: the median position counts."""

from tiny import main, text

ALLOWED = 0.1  # of the largest logit


def fault(model):
    ids = text(2, 40)
    model.bfloat16()
    rounded = model(input_ids=ids).logits.float()
    exact = model.float()(input_ids=ids).logits
    moved = ((exact - rounded).abs().amax(-1).median() / exact.abs().max()).item()
    return "" if moved <= ALLOWED else f"in bfloat16 the logits of the median position differ by {moved:.1e}"


if __name__ == "__main__":
    main(fault)
