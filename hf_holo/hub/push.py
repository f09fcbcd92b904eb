"""`hf-holo push`: bring a checkpoint to the Hub, with its code and a model card, in one commit or not at all."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm
from transformers.utils.hub import CHAT_TEMPLATE_DIR

from ..errors import HoloError, Parser, first_line
from ..modeling.checkpoint import is_finite
from .card import header_of, is_own, make_card, name_repository, read_card
from .code import missing_code

UNFINISHED = re.compile(r"\.tmp\d+$")  # as `hf_holo.files.replacing` calls a file that is being written
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
# Errors of a lost connection, by the package that huggingface_hub uses.
LOST = {"requests": ("ConnectionError", "Timeout"), "httpx": ("TransportError",)}


@dataclass(frozen=True)
class Item:
    """A file that is uploaded.

    Attributes:
        name: in the repository.
        content: its path, or its bytes.
        note: what was done to it.
    """

    name: str
    content: Path | bytes
    note: str = ""

    @property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def main(argv: list[str]) -> None:
    """Run `hf-holo push` with these arguments.

    Raises:
        HoloError: bad input, or the Hub refuses; the message is one line that says what to do.
    """
    parser = Parser(prog="hf-holo push", description=__doc__)
    parser.add_argument("DIR", help="folder of a checkpoint, as `hf-holo train` or `save_pretrained` leaves it")
    parser.add_argument("REPO", help="where it goes, as USER/NAME; it is created if it does not exist")
    parser.add_argument(
        "--dry-run", "--dry_run", action="store_true", help="list what would be uploaded, and send nothing"
    )
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser.add_argument("--license", help="for the header of the model card, for example apache-2.0")
    parser.add_argument("--message", default="Upload with hf-holo push", help="of the commit")
    args = parser.parse_args(argv)
    if not args.message.strip():
        raise HoloError("--message: it is empty, and a commit needs one")
    folder = Path(args.DIR)
    items, left_out = collect(folder, args.REPO, args.license)
    print_items(items, left_out)
    if args.dry_run:
        print("Nothing was sent.")
        return
    if constants.HF_HUB_OFFLINE:
        raise HoloError("REPO: HF_HUB_OFFLINE is set, so nothing can be sent")
    with naming_the_checkpoint(args.REPO):
        url = push(items, args.REPO, args.private, args.message)
    print(f"The model is at {url}")


def collect(folder: Path, repo: str, license: str | None = None) -> tuple[list[Item], list[str]]:
    """What of a folder is uploaded, and the names of the files and folders that stay.

    The code goes along (see [`missing_code`]), and a model card, in which the repository has its name. Hidden and
    unfinished files stay, pickles, which can run code when they are read, and folders but for that of chat templates.

    Raises:
        HoloError: the folder does not hold a complete checkpoint, or holds a link to a file elsewhere, or something
            that no card can be made from; or the name of the repository is bad.
    """
    if not folder.is_dir():
        raise HoloError(f"DIR: {str(folder)!r} is not a folder")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise HoloError(f"REPO: {repo!r} is not a name for a repository: {first_line(error)}") from None
    if "/" not in repo:
        raise HoloError(f"REPO: {repo!r} does not say whose it is; give USER/NAME")
    paths = sorted([*folder.iterdir(), *(folder / CHAT_TEMPLATE_DIR).glob("*")])
    kept = [path for path in paths if not _stays(path)]
    check_links(folder, kept)
    check_weights(folder)
    added = {name: text.encode() for name, text in missing_code(folder).items()}
    names = {path: path.relative_to(folder).as_posix() for path in paths}
    items = {names[path]: Item(names[path], path) for path in kept}
    for name, content in added.items():
        replaced = name in items and name.endswith(".py")
        items[name] = Item(name, content, "brought up to date" if replaced else "completed by this command")
    items["README.md"] = _card(folder, repo, license)
    sent = [items[name] for name in sorted(items)]
    stay = [path for path in paths if path not in kept and path.name != CHAT_TEMPLATE_DIR]
    return sent, [names[path] + "/" * path.is_dir() for path in stay]


def check_links(folder: Path, paths: list[Path]) -> None:
    """Refuse links out of the folder: what they lead to was not put there to be published.

    The cache of huggingface_hub is one place: in its `snapshots/COMMIT` all files are links to `blobs`.

    Raises:
        HoloError: the message names the link.
    """
    folder = folder.resolve()
    for path in paths:
        target = path.resolve()
        cached = folder.parent.name == "snapshots" and target.parent == folder.parents[1] / "blobs"
        if not (cached or target.is_relative_to(folder)):
            raise HoloError(
                f"DIR: {path.name} links to {str(target)!r}, outside of the folder; put a copy in its place, or delete "
                "the link"
            )


def check_weights(folder: Path) -> None:
    """Refuse weights that are missing, pickled, cut off, or not finite.

    Raises:
        HoloError: the message names the file.
    """
    files = sorted(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, LookupError, TypeError, AttributeError):
            raise HoloError(f"DIR: {str(index)!r} does not say which file holds which weights") from None
        missing = sorted(shards - {path.name for path in files})
        if missing:
            raise HoloError(f"DIR: {str(folder)!r} lacks {', '.join(missing)}, which {index.name} names")
    if not files:
        raise HoloError(f"DIR: {str(folder)!r} has no weights in safetensors format; `save_pretrained` writes them")
    for path in files:
        try:
            check_finite(path)
        except (OSError, SafetensorError) as error:
            raise HoloError(f"DIR: {str(path)!r} is not a complete safetensors file: {first_line(error)}") from None


def check_finite(path: Path) -> None:
    """Refuse a safetensors file with NaN or infinity, which `from_pretrained` would refuse after the download.

    Raises:
        HoloError: the message names the weight.
    """
    with safe_open(path, "pt") as file:
        for name in tqdm(file.keys(), desc=f"checking {path.name}", unit="weight", leave=False):
            weight = file.get_tensor(name)
            if weight.is_floating_point() and weight.numel() and not is_finite(weight):
                raise HoloError(f"DIR: {name} in {str(path)!r} holds NaN or infinity: the run diverged")


def _stays(path: Path) -> bool:
    no_file = not path.is_file()  # a folder, or a link to nowhere
    return no_file or path.name.startswith(".") or bool(UNFINISHED.search(path.name)) or path.suffix in PICKLES


def _card(folder: Path, repo: str, license: str | None) -> Item:
    """The card in the folder, in which, if it is one of this package, the repository has its name; else a new one.

    Raises:
        HoloError: the card cannot be read, or it is somebody's own and a license is to be written into it.
    """
    path = folder / "README.md"
    if not path.is_file():
        return Item(path.name, str(make_card(folder, repo, license=license)).encode(), "a new model card")
    card = read_card(path)
    if not is_own(card):
        if license is not None:
            raise HoloError(f"--license: {str(path)!r} is your own card; write the license into its header")
        return Item(path.name, path)
    name_repository(card, folder, repo)
    header = header_of(card)
    header.license = license or header.license
    return Item(path.name, str(card).encode(), "names the repository")


def print_items(items: list[Item], left_out: list[str]) -> None:
    """Print a table of what is uploaded, and what stays."""
    table = Table("file", "size", "")
    for item in items:
        table.add_row(item.name, decimal(item.size), item.note)
    Console().print(table)
    print(f"{len(items)} files, {decimal(sum(item.size for item in items))}")
    if left_out:
        print(f"not sent: {', '.join(left_out)}")


def push(items: list[Item], repo: str, private: bool = False, message: str = "Upload with hf-holo push") -> str:
    """Send the files as one commit on top of what the repository holds, and return its address.

    Large files go first, each by its hash: those that arrived before a connection broke are not sent again. The commit
    comes last, so a repository never holds half a model.

    Raises:
        HoloError: a public repository of this name exists and a private one is asked for, or the Hub refuses the header
            of the model card.
        errors of huggingface_hub: see [`naming_the_checkpoint`].
    """
    api = HfApi()
    url = api.create_repo(repo, private=private, exist_ok=True)
    repo = url.repo_id
    if private and not api.repo_info(repo).private:
        raise HoloError(f"--private: {repo!r} exists and is public; make it private in its settings, or name another")
    operations = [CommitOperationAdd(item.name, item.content) for item in items]
    try:
        api.create_commit(repo, operations, commit_message=message)
    except ValueError as error:
        if not str(error).startswith("Invalid metadata in README.md"):
            raise
        raise HoloError(f"DIR: the Hub refuses the header of README.md: {' '.join(str(error).split()[4:])}") from None
    return str(url)


@contextmanager
def naming_the_checkpoint(repo: str) -> Iterator[None]:
    """Turn what can go wrong on the way to the Hub into one line that says what to do.

    Raises:
        HoloError: instead of the errors of huggingface_hub.
    """
    try:
        yield
    except LocalTokenNotFoundError:
        raise HoloError("REPO: you are not logged in; run `hf auth login`, or set HF_TOKEN") from None
    except GatedRepoError:
        raise HoloError(f"REPO: {repo!r} is gated; ask for access on its page first") from None
    except RepositoryNotFoundError as error:
        raise HoloError(
            f"REPO: {repo!r} does not exist, or your token has no access to it: {first_line(error)}"
        ) from None
    except HfHubHTTPError as error:
        raise HoloError(f"REPO: {_refusal(repo, error)}") from None
    except _lost() as error:
        raise HoloError(
            f"REPO: the connection was lost ({type(error).__name__}); nothing was published. Run the same command "
            "again: large files that have arrived are not sent again"
        ) from None


def _lost() -> tuple[type[Exception], ...]:
    """What a lost connection raises. huggingface_hub needs requests before 1.0 and httpx since, not both."""
    found: list[type[Exception]] = [ConnectionError, TimeoutError]
    for package, names in LOST.items():
        if find_spec(package) is not None:
            found += [getattr(import_module(package), name) for name in names]
    return tuple(found)


def _refusal(repo: str, error: HfHubHTTPError) -> str:
    if error.response is None:
        return f"the Hub refused {repo!r}: {first_line(error)}"
    status = error.response.status_code
    if status == 401:
        return "the Hub does not accept your token; run `hf auth login`, or set HF_TOKEN to a valid one"
    if status == 403:
        return f"your token has no right to write to {repo!r}; use one that has"
    if status >= 500:
        return f"the Hub is out of order ({status}); nothing was published, try the same command later"
    return f"the Hub refused {repo!r} ({status}): {first_line(error)}"
