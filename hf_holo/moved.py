"""Modules under the names of version 0.1, for one version: what they held is found where it is now."""

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_DATA = tuple(f"data.{name}" for name in ("documents", "windows", "instructions"))
_MODELING = (
    "pretrained",
    "backbone",
    "heads",
    "filters",
    "phases",
    "scans",
    "binding",
    "losses",
    "layers",
    "recording",
)
MOVED = {
    "adapters": ("peft_defaults",),
    **{f"conversion.{name}": (f"conversion.surgery.{name}",) for name in ("bases", "calibration", "refit", "transfer")},
    "conversion.convert_arguments": ("conversion.convert.arguments",),
    "conversion.convert_linears": ("conversion.convert.linears",),
    "conversion.convert_mixers": ("conversion.convert.mixers",),
    "conversion.distill_arguments": ("conversion.distill.arguments",),
    "conversion.evaluation": ("data.scoring",),
    "conversion.objectives": ("conversion.distill.objectives",),
    "generation": ("generate",),
    "training.data": (*_DATA, "modeling.losses"),
    "training.masking": ("data.masking",),
    "training.tokenizers": ("data.tokenizers",),
    "modeling.base": tuple(f"modeling.{name}" for name in _MODELING),
    "modeling.ops": tuple(f"modeling.{name}" for name in _MODELING),
    "modeling.mixers": ("modeling.modeling_hsn",),
    "modeling.loading": ("modeling.checkpoint",),
    "modeling.remote": ("modeling.remote_code",),
}


class MovedFinder(MetaPathFinder, Loader):
    """Gives a module under its old name; a name in it is looked up in the modules that hold its parts now."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        package, _, old = name.partition(".")
        return ModuleSpec(name, self) if package == __package__ and old in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        places = MOVED[module.__name__.partition(".")[2]]
        now = " and ".join(f"{__package__}.{place}" for place in places)
        warnings.warn(f"{module.__name__} is {now} now; the old name works until the next version", FutureWarning, 2)

        def find(name: str) -> Any:
            for place in places:
                found = importlib.import_module(f"{__package__}.{place}")
                if hasattr(found, name):
                    return getattr(found, name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}; it is {now} now")

        module.__getattr__ = find  # type: ignore[method-assign]  # a module's is a function that one sets (PEP 562)


def install() -> None:
    """Let old names be found after all others have been tried."""
    if not any(isinstance(finder, MovedFinder) for finder in sys.meta_path):
        sys.meta_path.append(MovedFinder())
