"""`hf-holo serve`: the server of transformers, which speaks the OpenAI protocol, with the families of this package.

    hf-holo serve runs/my-model --port 8000

It is `transformers serve` and takes its options. That command finds a model's class by its name in the module
transformers, where only transformers' own are; here those of all registered families are there too, those of plug-ins
included, and models that surgery has converted.
"""

import sys
from importlib.metadata import version
from importlib.util import find_spec

from .errors import UNREADABLE, HoloError, first_line
from .registry import architectures


def main(argv: list[str]) -> None:
    """Run the server with these arguments, those of `transformers serve`, until it is stopped.

    Raises:
        HoloError: this transformers has no such server, or packages that it needs are missing.
    """
    check_server()
    from transformers.cli.transformers import app  # not in transformers 4.57

    make_known()
    try:
        app(["serve", *argv], prog_name="hf-holo", standalone_mode=False)
    except UNREADABLE as error:  # a model that is named here is loaded before anything is served
        raise HoloError(f"serve: {first_line(error)}") from None
    except Exception as error:
        message = getattr(error, "format_message", None)  # of whichever click typer brings
        if message is None:
            raise
        raise HoloError(f"serve: {message().strip().splitlines()[0]}") from None


def check_server() -> None:
    """Raise HoloError where there is nothing to run.

    The server of transformers 4.57 is not run: it keeps the cache of the last request in one place for all clients, so
    that an answer may continue from the state of somebody else's conversation.
    """
    release = version("transformers")
    if int(release.partition(".")[0]) < 5:
        raise HoloError(
            f"serve: transformers {release} keeps one cache for all its clients; install transformers 5 to serve models"
        )
    if missing := [package for package in ("fastapi", "openai", "pydantic", "uvicorn") if find_spec(package) is None]:
        raise HoloError(f"serve: {', '.join(missing)} must be installed; `pip install 'hf-holo[serve]'`")


def make_known() -> None:
    """Give the module transformers the model classes of all registered families, under their own names."""
    transformers = sys.modules["transformers"]  # which puts another module in its own place while it is imported
    for architecture in architectures().values():
        for model in architecture.models.values():
            if not hasattr(transformers, model.__name__):
                setattr(transformers, model.__name__, model)
