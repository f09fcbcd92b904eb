"""Defaults for PEFT, so that LoRA, IA3 and their like need no `target_modules` on the families of this package.

PEFT looks them up by `model_type` in tables of its own. They are filled when PEFT is imported, which takes too long to
do it for them.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

TABLES = "peft.utils.constants"
IN_BLOCKS = r"(.*\.)?(layers|blocks|decoder)\.\d+\..*_proj"  # every linear layer in the blocks, of all families

_SCALED: dict[str, tuple[Sequence[str], Sequence[str]]] = {}  # by family: what IA3 scales


def offer_adapters(family: str, outputs: Sequence[str], inputs: Sequence[str]) -> None:
    """Make LoRA, IA3 and their like work on a family without arguments.

    LoRA adapts every linear layer in the blocks, and so does every method that by default adapts what LoRA does in a
    Llama: VeRA, LoHa, LoKr, OFT and others.

    Args:
        family: the `model_type` of its config.
        outputs: names of the linear layers whose outputs IA3 scales: those of keys and values.
        inputs: names of those whose inputs it scales: what reads the inner activations of a channel mix.
    """
    _SCALED[family] = outputs, inputs
    if TABLES in sys.modules:
        _fill(sys.modules[TABLES])


def _fill(tables: ModuleType) -> None:
    by_name = {name: table for name, table in vars(tables).items() if name.endswith("_MODULES_MAPPING")}
    lora = by_name["TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"]
    like_lora = [table for table in by_name.values() if table.get("llama") == lora["llama"]]
    for family, (outputs, inputs) in _SCALED.items():
        for table in like_lora:
            table.setdefault(family, IN_BLOCKS)
        by_name["TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING"].setdefault(family, [*outputs, *inputs])
        by_name["TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING"].setdefault(family, [*inputs])


class _AfterImport(MetaPathFinder):
    """Fills the tables as soon as PEFT has made them."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TABLES:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_fill(module: ModuleType) -> None:
            sys.meta_path.remove(self)
            execute(module)
            _fill(module)

        spec.loader.exec_module = execute_and_fill  # type: ignore[method-assign]  # of this one loader
        return spec


def install() -> None:
    """Fill the tables of PEFT as soon as it is imported, if it has not been."""
    if TABLES not in sys.modules and not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
