"""lm-eval with the families and tasks of this package: its evaluator and its command, and the model type `hf-holo`.

lm-eval finds no model types by entry points, so its command is called through this module, which registers ours:

    python -m hf_holo.eval.harness run --model hf-holo --model_args pretrained=runs/mine --tasks hf_holo_piqa
        --metadata '{"zero_shot_data": "FOLDER"}'
"""

import sys
from pathlib import Path
from typing import Any

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from .suites.models import Evaluated, causality_of, refuse_leaks

TASKS = Path(__file__).parent / "suites" / "tasks"
BLOCK = 256  # tokens at which, too, a leak is looked for


@register_model("hf-holo")
class HoloLM(HFLM):
    """Any causal language model of transformers or of this package; one that sees the future is refused.

    Args:
        pretrained: a folder, a Hub id, or a model.
        allow_leaks: evaluate a model that sees the future all the same.
        arguments: those of lm-eval's `hf`.

    Raises:
        HoloError: the model leaks.
    """

    _DEFAULT_MAX_LENGTH = 16_384  # for models that name no limit, as those with a state of constant size

    def __init__(self, pretrained: Any, allow_leaks: bool = False, **arguments: Any) -> None:
        super().__init__(pretrained, **arguments)
        if not allow_leaks:
            model = Evaluated(str(pretrained) if isinstance(pretrained, str) else "model", self.model)
            refuse_leaks(model, causality_of(model, BLOCK), allow=False)


if __name__ == "__main__":
    if "--include_path" not in sys.argv:
        sys.argv += ["--include_path", str(TASKS)]
    cli_evaluate()
