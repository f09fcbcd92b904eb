"""Whether a model that reads both ways tells what stands before a token from what stands after it."""

import torch

from .checks import Violation, check
from .subject import Subject

MIRRORED = 1e-6  # relative difference of a text and its mirror image below which they are one text
REACH, FAR, TEXTS, WEIGHTS = 32, 24, 16, 5  # tokens on each side of one that listens, where they speak, and draws
ORDERED = 0.12  # measured: 0.3 to 0.9 where order is seen, up to 0.04 where an uneven filter alone tells sides apart


@check("causality", "text", "bidirectional")
def order_is_seen(subject: Subject) -> str:
    """A text is not its mirror image, and what comes far before a token is told from what comes far after it."""
    ids = subject.ids(2, subject.lengths(2, 9, 33)[-1])
    there, back = subject.run(ids), subject.run(ids.flip(1))
    if "token outputs" in subject.features:
        back = back.flip(1)
    if not (there - back).abs().max() > MIRRORED * there.abs().max():
        raise Violation("a text and its mirror image give the same output: order is not seen")
    drawn = [_sides(subject.drawn_again(WEIGHTS * subject.seed + number)) for number in range(WEIGHTS)]
    told = torch.tensor(drawn).log().mean().exp().item()
    if not told > ORDERED:
        raise Violation(
            f"before and after are hardly told apart: exchanging two tokens {_far(subject)} before and after another "
            f"moves it by {told:.1e} of what other tokens there do, needed is {ORDERED}"
        )
    return f"exchanging what stands before and after moves an output by {told:.0%} of what other tokens do"


def _sides(subject: Subject) -> float:
    """What exchanging A far before and B far after a token moves, relative to A in place of B on both sides."""
    reach = REACH if subject.max_length is None else min(REACH, (subject.max_length - 1) // 2)
    rest, a, b = subject.ids(3 * TEXTS, 1, 5).reshape(3, TEXTS)

    def listen(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        ids = rest[:, None].repeat(1, 2 * reach + 1)
        ids[:, reach - _far(subject)], ids[:, reach + _far(subject)] = before, after
        output = subject.run(ids)
        return output[:, reach] if "token outputs" in subject.features else output

    exchanged, other = listen(a, b) - listen(b, a), listen(a, a) - listen(b, b)
    return (exchanged.norm() / other.norm()).item()


def _far(subject: Subject) -> int:
    return FAR if subject.max_length is None else min(FAR, (subject.max_length - 1) // 2)
