"""The tiny random models of the zoo in plain transformers, and the command line that the scripts beside it share.

    python docs/zoo/padding.py BartForCausalLM

says what it saw of each class, and exits with status 1 if that is a fault. Torch and transformers are all it needs.
"""

import json
import sys
import warnings
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import transformers

MAJOR = transformers.__version__.partition(".")[0]
CACHE_NAMES = ("past_key_values", "cache_params", "cache")  # what releases and models call it
SAME = 1e-3  # relative difference that may be rounding in float32
NEW, NO_END = 12, 1_000_000  # tokens that are generated; an id that none of them has


def main(fault: Callable[[Any], str]) -> None:
    """Print what `fault` says of each class on the command line; it says nothing where it sees nothing."""
    torch.set_num_threads(1)  # models so small gain nothing from more
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    warnings.simplefilter("ignore")
    said = {}
    for name in sys.argv[1:]:
        model = build(name)
        torch.manual_seed(0)
        try:
            with torch.no_grad():
                said[name] = fault(model)
        except Exception as error:  # this, too, is what a user would see
            said[name] = f"raises {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        print(f"{name}: {said[name] or 'nothing seen'}", flush=True)
    sys.exit(any(said.values()))


def build(name: str) -> Any:
    """A model of this class, its weights moved so that nothing is zero, with special tokens 0, 1 and 2."""
    arguments = json.loads((Path(__file__).parent / f"configs-{MAJOR}.json").read_text(encoding="utf-8"))[name]
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**arguments)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn_like(weight)
    return model


def text(rows: int, length: int) -> torch.Tensor:
    """Random ids `[rows, length]` without special tokens."""
    return torch.randint(3, 97, (rows, length))


def difference(expected: torch.Tensor, got: torch.Tensor) -> float:
    """The largest, relative to the largest value expected; NaN if one is."""
    return ((expected - got).abs().max() / expected.abs().max()).item()


def takes(model: Any, name: str) -> bool:
    """Whether its forward names this argument."""
    return name in signature(model.forward).parameters


def generate(model: Any, ids: torch.Tensor, **options: Any) -> Any:
    """`NEW` tokens, greedily unless the options say otherwise; every token of `ids` counts unless a mask is given."""
    mask = {"attention_mask": torch.ones_like(ids)} if takes(model, "attention_mask") else {}
    usual = {"do_sample": False, "max_new_tokens": NEW, "eos_token_id": NO_END}
    return model.generate(ids, **{**mask, **usual, **options})


def cache_name(model: Any) -> str | None:
    """What its forward calls the cache; None if it takes none."""
    return next((name for name in CACHE_NAMES if takes(model, name)), None)


def cache_of(output: Any) -> Any:
    """The cache that a forward or generate() returned; None if it returned none."""
    return next((output[name] for name in CACHE_NAMES if output.get(name) is not None), None)
