"""Characters of one text file: the usual split, random training windows, the loss over the whole validation split."""

from pathlib import Path

import torch
import torch.nn.functional as F


class CharacterText:
    """The first 90 % of a text for training and the rest for validation, as ids of its distinct characters."""

    def __init__(self, path: str | Path):
        text = Path(path).read_text(encoding="utf-8")
        self.characters = sorted(set(text))
        index = {character: i for i, character in enumerate(self.characters)}
        ids = torch.tensor([index[character] for character in text])
        border = int(0.9 * len(ids))
        self.train, self.validation = ids[:border], ids[border:]

    @property
    def vocab_size(self) -> int:
        return len(self.characters)

    def batch(self, rows: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Random training windows and, one character on, their targets, both `[rows, length]`."""
        starts = torch.randint(len(self.train) - length, (rows,), generator=generator)
        windows = self.train[starts[:, None] + torch.arange(length + 1)]  # [rows, length + 1]
        return windows[:, :-1], windows[:, 1:]


@torch.no_grad()
def windowed_loss(model: torch.nn.Module, ids: torch.Tensor, window: int = 256, rows: int = 64) -> float:
    """Nats per character over `ids` in windows of `window`: every character but the first is scored exactly once."""
    was_training = model.training
    model.eval()
    padding = -(len(ids) - 1) % window
    inputs = F.pad(ids[:-1], (0, padding)).view(-1, window)
    targets = F.pad(ids[1:], (0, padding), value=-100).view(-1, window)  # -100: not scored
    total = 0.0
    for x, y in zip(inputs.split(rows), targets.split(rows), strict=True):
        logits = model(input_ids=x, use_cache=False).logits
        total += F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum").item()
    model.train(was_training)
    return total / (len(ids) - 1)
