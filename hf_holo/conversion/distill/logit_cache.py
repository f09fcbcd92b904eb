"""The teacher's logits on disk: the most likely tokens of every position, in a safetensors file."""

from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...data.windows import AnyWindows, TokenDataset, fingerprint
from ...files import replacing
from .objectives import SoftLabels


class CachedLogits(TokenDataset):
    """Training windows with the soft labels that a teacher gave them.

    Args:
        windows: windows of equal length, with `input_ids`.
        path: what [`write_cache`] wrote for them.
    """

    def __init__(self, windows: AnyWindows, path: Path) -> None:
        self.windows = windows
        self.file = safe_open(path, "pt")  # maps the file into memory: only the rows in use are read
        self.names = list(self.file.keys())

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.windows[index] | {f"teacher_{name}": self.file.get_slice(name)[index] for name in self.names}


@torch.no_grad()
def write_cache(
    teacher: PreTrainedModel, windows: AnyWindows, path: Path, top_k: int, temperature: float, batch_size: int
) -> None:
    """Compute the soft labels of all windows, unless `path` already holds them.

    Args:
        top_k: tokens K to keep of every distribution; at most the vocabulary.
    """
    top_k = min(top_k, teacher.config.vocab_size)
    metadata = {
        "teacher": str(teacher.name_or_path),
        "text": fingerprint(windows),
        "temperature": str(temperature),
        "top_k": str(top_k),
    }
    if path.is_file():
        with safe_open(path, "pt") as file:
            if file.metadata() == metadata:
                return
    log_probs, indices = [], []
    for start in tqdm(range(0, len(windows), batch_size), desc="teacher's logits", unit="batch"):
        rows = [windows[i]["input_ids"] for i in range(start, min(start + batch_size, len(windows)))]
        soft = SoftLabels.of(teacher(input_ids=torch.stack(rows).to(teacher.device)).logits, temperature, top_k)
        log_probs.append(soft.log_probs.cpu())
        indices.append(cast(torch.Tensor, soft.indices).int().cpu())
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file({"log_probs": torch.cat(log_probs), "indices": torch.cat(indices)}, temporary, metadata)
    print(
        f"the teacher's logits for {len(windows)} windows are saved in {path} ({path.stat().st_size / 2**20:.0f} MiB)"
    )
