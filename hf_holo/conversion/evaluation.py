"""Windows of text, and how well a language model predicts them: perplexity, and a sample to read."""

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..errors import HoloError
from ..generation import generate_text

IGNORED = -100
MASKED_SHARE = 0.15  # of the tokens that a masked language model is asked for


@dataclass(frozen=True)
class Windows:
    """Equally long pieces of a text.

    Attributes:
        inputs: token ids `[N, T]`.
        targets: `[N, T]`, what the model shall predict at each place; -100 where nothing is asked.
    """

    inputs: torch.Tensor
    targets: torch.Tensor

    def __len__(self) -> int:
        return len(self.inputs)


def cut_windows(tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> torch.Tensor:
    """Token ids `[N, length]` of a text, without special tokens; the rest at the end is dropped."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, dtype=torch.long)
    return ids[: len(ids) // length * length].view(-1, length)


def spread(windows: torch.Tensor, count: int) -> torch.Tensor:
    """`count` windows at equal distances over all of them; all if there are fewer."""
    count = min(count, len(windows))
    return windows[torch.arange(count) * len(windows) // max(count, 1)]


def next_token(windows: torch.Tensor) -> Windows:
    """Every token is to be predicted from those before it."""
    return Windows(windows, torch.cat([windows[:, 1:], windows.new_full((len(windows), 1), IGNORED)], dim=1))


def masked_token(windows: torch.Tensor, tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> Windows:
    """15 % of the tokens are masked, and to be predicted from the others.

    Raises:
        HoloError: the tokenizer has no mask token.
    """
    if tokenizer.mask_token_id is None:
        raise HoloError("teacher: its tokenizer has no mask token, which a masked language model needs")
    hidden = torch.rand(windows.shape, generator=torch.Generator().manual_seed(seed)) < MASKED_SHARE
    return Windows(windows.masked_fill(hidden, tokenizer.mask_token_id), windows.masked_fill(~hidden, IGNORED))


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: Windows, description: str = "perplexity") -> float:
    """exp of the mean loss per predicted token, each window on its own."""
    model.eval()
    loss = count = 0
    pairs = zip(windows.inputs, windows.targets, strict=True)
    for inputs, targets in tqdm(pairs, desc=description, total=len(windows), unit="window"):
        logits = model(input_ids=inputs[None].to(model.device)).logits[0].float()  # [T, V]
        targets = targets.to(logits.device)
        loss += F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum").item()
        count += (targets != IGNORED).sum().item()
    return torch.tensor(loss / count).double().exp().item()  # infinite rather than an OverflowError


def sample(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: int, seed: int) -> str:
    """The prompt and its continuation, drawn with a fixed seed."""
    set_seed(seed)
    return generate_text(model, tokenizer, prompt, tokens)


def numbers_on_disk(folder: Path, modules: Iterable[str] | None = None) -> int:
    """How many numbers the safetensors files of a checkpoint hold, for these modules or in all."""
    prefixes = None if modules is None else tuple(f"{name}." for name in modules)
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        for key, entry in header.items():
            if key != "__metadata__" and (prefixes is None or key.startswith(prefixes)):
                total += math.prod(entry["shape"])
    return total
