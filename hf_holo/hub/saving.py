"""The model card of what is saved and pushed from Python. `hf_holo.install` lets the models of this
package write it."""

import os
import warnings
from pathlib import Path

from huggingface_hub import HfApi

from ..errors import HoloError


def write_missing_card(
    folder: str | os.PathLike, repo: str | None = None, token: str | bool | None = None, before: bytes | None = None
) -> bool:
    """Put a card made from the facts into a folder, where nobody has written one.

    Args:
        folder: that `save_pretrained` has filled.
        repo: where it goes; its name is the one that loads the model. Default: nowhere, and the folder's name is.
        token: for the Hub.
        before: what README.md said before transformers wrote over it on the way to `repo`; None if there was none.

    Returns:
        Whether README.md may be uploaded: not if both the folder and the repository have their own.
    """
    from . import card as cards  # late: importing hf_holo is to stay fast

    folder = Path(folder)
    if repo is None:
        try:
            if (folder / "config.json").is_file():  # not for an adapter
                cards.write_card(folder)
        except HoloError as error:
            warnings.warn(f"saved without a model card: {error}", stacklevel=3)
        return True
    path, published = folder / "README.md", HfApi().file_exists(repo, "README.md", token=token)
    if before is not None:
        path.write_bytes(before)
        card = cards.read_card(path)
        if cards.is_own(card) and not published:
            cards.name_repository(card, folder, repo)
            card.save(path)
    elif not published:
        cards.add_tags(cards.make_card(folder, repo), path).save(path)
    return before is None or not published
