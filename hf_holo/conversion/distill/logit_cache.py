"""The teacher's logits on disk: the most likely tokens of every position, in a safetensors file."""

from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...data.windows import AnyWindows, TokenDataset, fingerprint
from ...distributed.processes import by_main, count, gathered, index, is_main
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

    Each of several processes computes a part of them into a file of its own, and the main one joins the files; all have
    to call this, and see one disk.

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
    if all(gathered(_is_written(path, metadata))):
        return
    by_main(lambda: path.parent.mkdir(parents=True, exist_ok=True))
    own = _soft_labels(teacher, windows, top_k, temperature, batch_size)
    parts = [path.with_name(f"{path.name}.part{number}") for number in range(count())]
    if not is_main():
        with replacing(parts[index()]) as temporary:
            save_file(own, temporary)
    by_main(lambda: _join(own, parts[1:], path, metadata))


def _is_written(path: Path, metadata: dict[str, str]) -> bool:
    if not path.is_file():
        return False
    with safe_open(path, "pt") as file:
        return file.metadata() == metadata


def _soft_labels(
    teacher: PreTrainedModel, windows: AnyWindows, top_k: int, temperature: float, batch_size: int
) -> dict[str, torch.Tensor]:
    """Those of the windows of this process, which are neighbours, so that the parts in a row are the whole."""
    mine = range(len(windows) * index() // count(), len(windows) * (index() + 1) // count())
    log_probs, indices = [torch.empty(0)], [torch.empty(0, dtype=torch.int32)]
    starts = range(0, len(mine), batch_size)
    for start in tqdm(starts, desc="teacher's logits", unit="batch", disable=not is_main()):
        rows = [windows[i]["input_ids"] for i in mine[start : start + batch_size]]
        soft = SoftLabels.of(teacher(input_ids=torch.stack(rows).to(teacher.device)).logits, temperature, top_k)
        log_probs.append(soft.log_probs.cpu())
        indices.append(cast(torch.Tensor, soft.indices).int().cpu())
    return {"log_probs": torch.cat(log_probs), "indices": torch.cat(indices)}


def _join(own: dict[str, torch.Tensor], parts: list[Path], path: Path, metadata: dict[str, str]) -> None:
    """Write the soft labels of the main process and, after them, those of the others."""
    pieces = [own, *(load_file(part) for part in parts)]
    whole = {name: torch.cat([piece[name] for piece in pieces]) for name in own}
    with replacing(path) as temporary:
        save_file(whole, temporary, metadata)
    for part in parts:
        part.unlink()
    size = path.stat().st_size / 2**20
    print(f"the teacher's logits for {len(whole['indices'])} windows are saved in {path} ({size:.0f} MiB)")
