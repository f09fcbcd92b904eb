"""A model that is saved and loaded must give what it gave."""

import tempfile

from tiny import SAME, difference, main, text


def fault(model):
    ids = text(1, 20)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder).eval()
    moved = difference(model(input_ids=ids).logits, loaded(input_ids=ids).logits)
    return "" if moved <= SAME else f"saved and loaded again, the logits differ by {moved:.1e}"


if __name__ == "__main__":
    main(fault)
