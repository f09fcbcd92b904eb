"""Prompt lookup proposes tokens and takes back the wrong ones: it must give what greedy decoding gives."""

import torch
from tiny import generate, main, text


def fault(model):
    ids = text(1, 6).repeat(1, 3)
    greedy, looked_up = generate(model, ids), generate(model, ids, prompt_lookup_num_tokens=3)
    return "" if torch.equal(greedy, looked_up) else "generate(prompt_lookup_num_tokens=3) is not greedy decoding"


if __name__ == "__main__":
    main(fault)
