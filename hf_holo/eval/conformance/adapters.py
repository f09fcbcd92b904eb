"""LoRA adapters: which modules PEFT reaches and which not, and whether they train, travel and merge. In float64."""

import functools
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch.utils._pytree import tree_leaves

from .checks import Violation, assert_same, check
from .quiet import quiet
from .subject import Subject, is_output, main_output

STEPS = 5


# ---------------------------------------------------------------------------------------------- the checks
@check("adapters", "linear layers")
def reach_of_lora(subject: Subject) -> str:
    """PEFT finds the linear layers; the remark says what it leaves outside."""
    adapted = _adapted(subject)
    reached = {_original(name) for name, module in adapted.named_modules() if isinstance(module, LoraLayer)}
    if not reached:
        raise Violation('PEFT reaches no layer with target_modules="all-linear"')
    linear = subject.linear_layers
    outside = [name for name, _ in subject.model.named_parameters() if name.rpartition(".")[0] not in reached]
    remark = f"reaches {len(reached)} of {len(linear)} linear layers"
    if set(linear) - reached:
        remark += f" (not {_shortened(name for name in linear if name not in reached)})"
    return f"{remark}; outside are {len(outside)} parameters: {_shortened(outside)}" if outside else remark


@check("adapters", "linear layers")
def training_with_lora(subject: Subject) -> str:
    """Every adapter gets a gradient, a few steps lower a loss, and the weights of the model stay."""
    adapted = _adapted(subject)
    weights = {name: p for name, p in adapted.named_parameters() if not p.requires_grad}
    adapters = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in (weights | adapters).items()}
    losses = _train(adapted, subject)
    idle = {_original(name) for name, p in adapters.items() if torch.equal(p, before[name])}
    if idle:
        raise Violation(
            f"the adapter of {min(idle)!r} gets no gradient ({len(idle)} such): the weight is used without calling "
            "the layer, or the layer is not used at all"
        )
    moved = [_original(name) for name, p in weights.items() if not torch.equal(p, before[name])]
    if moved:
        raise Violation(f"training adapters changes the weight {moved[0]!r} of the model")
    if not losses[-1] < losses[0]:
        raise Violation(
            f"{STEPS} steps of Adam on the adapters do not lower the loss: {losses[0]:.4f} to {losses[-1]:.4f}"
        )
    return f"loss {losses[0]:.3f} to {losses[-1]:.3f} in {STEPS} steps"


@check("adapters", "linear layers")
def moving_and_merging_lora(subject: Subject) -> str:
    """A saved adapter gives on a fresh model what it gave; a merged one too, unless the model refuses to merge."""
    adapted = _adapted(subject)
    _train(adapted, subject)
    expected = _output(adapted, subject)
    with TemporaryDirectory() as folder, quiet():
        # without embeddings: to decide on its own, PEFT would ask the Hub
        adapted.save_pretrained(folder, save_embedding_layers=False)
        if not (Path(folder) / "adapter_model.safetensors").exists():
            raise Violation("the adapter is not saved as safetensors")
        torch.manual_seed(subject.seed + 1)  # a lost adapter must not be drawn again by luck
        loaded = PeftModel.from_pretrained(subject.copy(), folder).eval()
    assert_same(_output(loaded, subject), expected, "a reloaded adapter changes the output", subject.tolerance)
    try:
        with quiet():
            merged = adapted.merge_and_unload()
    except TypeError as refusal:  # a layer whose weight is computed cannot take the adapter in
        return f"merging is refused: {refusal}"
    return assert_same(_output(merged, subject), expected, "merging the adapter changes the output", subject.tolerance)


# ---------------------------------------------------------------------------------------------- adapting
def _adapted(subject: Subject) -> PeftModel:
    torch.manual_seed(subject.seed)
    with quiet():
        try:
            return get_peft_model(subject.copy(), LoraConfig(target_modules="all-linear", r=4)).eval()
        except ValueError as refusal:
            raise Violation(f'PEFT refuses target_modules="all-linear": {refusal}') from refusal


def _train(adapted: PeftModel, subject: Subject) -> list[float]:
    """Losses of a few steps of Adam that push every number of the outputs towards a random sign, and of the end."""
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(STEPS + 1):
        generator = subject.generator(6)
        outputs = _tensors(adapted(**_inputs(subject)))
        loss = functools.reduce(torch.add, (F.soft_margin_loss(y, _signs(y, generator)) for y in outputs))
        losses.append(loss.item())
        if len(losses) <= STEPS:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return losses


def _signs(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return 2.0 * torch.randint(2, x.shape, generator=generator) - 1


def _inputs(subject: Subject) -> dict[str, Any]:
    inputs = subject.inputs(length=subject.lengths(2, 16)[-1])
    return inputs | ({"use_cache": False} if "use_cache" in subject.arguments else {})


def _tensors(output: Any) -> Iterable[torch.Tensor]:
    """All outputs that depend on the weights: a pooler is trained too."""
    return [y for y in tree_leaves(tuple(output.values())) if is_output(y) and y.requires_grad]


@torch.no_grad()
def _output(model: torch.nn.Module, subject: Subject) -> torch.Tensor:
    return main_output(model(**_inputs(subject)))


# ---------------------------------------------------------------------------------------------- names
def _original(name: str) -> str:
    """The name in the model of what PEFT has wrapped."""
    return re.sub(r"\.(base_layer|lora_[A-Z]\w*|default|weight|bias)\b", "", name.removeprefix("base_model.model."))


def _shortened(names: Iterable[str], limit: int = 6) -> str:
    """Names within their layer, each once with its count: "mixer.norm (2), embed_tokens"."""
    counts = Counter(_within_layer(name.removesuffix(".weight")) for name in names)
    words = [f"{name} ({count})" if count > 1 else name for name, count in counts.items()]
    rest = f" and {len(words) - limit} more kinds" if len(words) > limit else ""
    return ", ".join(words[:limit]) + rest


def _within_layer(name: str) -> str:
    """What follows the number of the layer; without one, the last word or, of a bias, the last two."""
    _, number, within = cast(re.Match, re.fullmatch(r"(.*\.(\d+)\.)?(.*)", name)).groups()
    return within if number else ".".join(within.split(".")[-2 if within.endswith(".bias") else -1 :])
