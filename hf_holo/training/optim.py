"""Optimizers: MuonAdamW for training from scratch, WhitenedAdamW for the coefficients of fitted holographic layers.

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) orthogonalises the momentum of a weight matrix.
That suits matrices which map activations to activations; embeddings, output heads, vectors and the parameters of
filters are not such maps and stay with AdamW. Both rules are torch's own (`torch.optim.Muon`, `torch.optim.AdamW`), but
for the precision of Muon on a CPU.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Muon, Optimizer


def split_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Sort the trainable parameters of `model` by what they are, never by what they are called.

    Returns:
        A dict with three lists, which together hold every trainable parameter once:
        `"hidden"`: weights of the `nn.Linear` modules inside the blocks (below an `nn.ModuleList` of the base model)
        that no other kind of module shares; `"matrices"`: the other weights of `nn.Linear` and `nn.Embedding`;
        `"rest"`: biases, norms, frequencies, decays, gates, kernels.
    """
    base = getattr(model, "base_model", model)
    lists = [module for module in base.modules() if isinstance(module, nn.ModuleList)]
    inside = {module for blocks in lists for module in blocks.modules() if isinstance(module, nn.Linear)}
    owners: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                owners.setdefault(parameter, []).append((module, name))

    groups: dict[str, list[nn.Parameter]] = {"hidden": [], "matrices": [], "rest": []}
    for parameter, held_by in owners.items():
        is_weight = parameter.ndim == 2 and all(name == "weight" for _, name in held_by)
        if is_weight and all(module in inside for module, _ in held_by):
            groups["hidden"].append(parameter)
        elif is_weight and all(isinstance(module, nn.Linear | nn.Embedding) for module, _ in held_by):
            groups["matrices"].append(parameter)
        else:
            groups["rest"].append(parameter)
    return groups


def loss_of(closure: Callable[[], float] | None) -> float | None:
    """What a closure says that evaluates the model again, if there is one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class FloatMuon(Muon):
    """`torch.optim.Muon`, which orthogonalises in bfloat16 wherever it runs; here it is float32 on a CPU.

    Most CPUs have no units for bfloat16, and it takes many times as long there (benchmarks/muon_precision.py). On other
    devices the updates are torch's, to the bit.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters once; `closure` re-evaluates the model and returns the loss, as in torch."""
        loss = loss_of(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: nn.Parameter, grad: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(grad)
        momentum = state["momentum_buffer"].lerp_(grad, 1 - group["momentum"])
        update = grad.lerp(momentum, group["momentum"]) if group["nesterov"] else momentum
        update = orthogonalized(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        rows, columns = parameter.shape
        adamw = group["adjust_lr_fn"] == "match_rms_adamw"
        scale = 0.2 * math.sqrt(max(rows, columns)) if adamw else math.sqrt(max(1, rows / columns))
        parameter.add_(update, alpha=-group["lr"] * scale)


def orthogonalized(
    matrix: torch.Tensor,
    coefficients: tuple[float, float, float],
    steps: int,
    eps: float,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The matrix with its singular values near 1, by a Newton-Schulz iteration of the fifth degree.

    Args:
        matrix: `[O, I]`.
        coefficients: a, b, c of x ← a x + b x³ + c x⁵ for the singular values x.
        steps: of the iteration.
        eps: least norm that the matrix is divided by.
        dtype: of the iteration; default: float32 on a CPU, bfloat16 elsewhere.
    """
    a, b, c = coefficients
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    x = wide.to(dtype or (torch.float32 if matrix.device.type == "cpu" else torch.bfloat16))
    x = x / x.norm().clamp_min(eps)  # then no singular value is above 1
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide is matrix else x.mT


class MuonAdamW(Optimizer):
    """Muon for some parameter groups and AdamW for the others, behind one `param_groups` and one `state`.

    Schedulers, `state_dict()`, `load_state_dict()`, Trainer and Accelerate see an ordinary optimizer. Each step lends
    the groups and their state to a [`FloatMuon`] and a `torch.optim.AdamW`, so the updates are exactly theirs.

    Args:
        params: group dicts, each with `"params"` and `"rule"`, which is `"muon"` or `"adamw"`. A group may override
            every option of its rule. `MuonAdamW.for_model` makes the groups of a model.
        lr: learning rate of the groups that bring none.
        weight_decay: decoupled weight decay of the groups that bring none.
        betas: AdamW's decay rates.
        eps: AdamW's epsilon.

    Raises:
        ValueError: a group without a known `"rule"`, or a parameter under Muon that is not a matrix, or sharded.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 4e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        # torch refuses an optimizer without parameters; the true groups arrive through add_param_group.
        nothing = [nn.Parameter(torch.zeros(1, 1))]
        self._rules: dict[str, Optimizer] = {
            "muon": FloatMuon(nothing, lr=lr, weight_decay=weight_decay),
            "adamw": AdamW(nothing, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps),
        }
        super().__init__(params, defaults={})

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        lr: float = 4e-3,
        muon_lr_ratio: float = 5.0,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> "MuonAdamW":
        """Make the optimizer of a model, with the groups of `split_parameters`.

        Hidden matrices get Muon at `muon_lr_ratio * lr`; the other matrices get AdamW at `lr`; all the rest gets AdamW
        at `lr` without weight decay. The AdamW groups come first, so the learning rate that Trainer logs is `lr`.

        Raises:
            ValueError: the model has no trainable `nn.Linear` inside its blocks.
        """
        parameters = split_parameters(model)
        if not parameters["hidden"]:
            raise ValueError("model: has no trainable nn.Linear inside its blocks for Muon; use AdamW instead")
        groups: list[dict[str, Any]] = [
            {"params": parameters["matrices"], "rule": "adamw"},
            {"params": parameters["rest"], "rule": "adamw", "weight_decay": 0.0},
            {"params": parameters["hidden"], "rule": "muon", "lr": muon_lr_ratio * lr},
        ]
        return cls([group for group in groups if group["params"]], lr, weight_decay, betas, eps)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, which must name its `"rule"`; the rule's optimizer fills in the options that it lacks."""
        if not isinstance(param_group, dict) or param_group.get("rule") not in self._rules:
            raise ValueError(f"params: every group needs a 'rule' out of {sorted(self._rules)}")
        super().add_param_group(param_group)
        if param_group["rule"] == "muon" and any(p.ndim != 2 for p in param_group["params"]):
            raise ValueError("params: Muon takes matrices only; give vectors and kernels the rule 'adamw'")
        if param_group["rule"] == "muon" and any(isinstance(p, DTensor) for p in param_group["params"]):
            raise ValueError("params: Muon takes whole matrices, and these are sharded; use AdamW")
        for option, value in self._rules[param_group["rule"]].defaults.items():
            param_group.setdefault(option, value)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters once; `closure` re-evaluates the model and returns the loss, as in torch."""
        loss = loss_of(closure)
        for rule, optimizer in self._rules.items():
            # Lent again at each step, because load_state_dict replaces both objects.
            optimizer.param_groups = [group for group in self.param_groups if group["rule"] == rule]
            optimizer.state = self.state
            optimizer.step()
        return loss


class WhitenedAdamW(AdamW):
    """AdamW on matrices whose inputs are far from uncorrelated, in coordinates where they are not.

    AdamW moves every entry of a matrix C by about the learning rate. Where C reads features z that are correlated, or
    of very unequal size, such a step changes its outputs by far too much in a few directions, and hardly in the others.
    Here the steps are those that AdamW would take on Ĉ = C G^½ V, which reads Vᵀ G^-½ z instead: features of unit size
    and without correlation, turned so that the columns of Ĉ are orthogonal, the singular directions of what C does.
    They are relative to the size of the column of Ĉ at the start. (The input side of K-FAC, Martens and Grosse, 2015,
    with the features measured once.)

    Args:
        grams: for each parameter `[O, R]`, G = E[z zᵀ] of its features `[R, R]`. Parameters with the same object read
            the same features, and share V.
        lr: learning rate, relative: the step of an entry divided by the root mean square of its column of Ĉ.
        betas, eps: as in AdamW.
        others: parameters without features, such as biases; AdamW trains them as they are, with the same `lr`.

    Raises:
        ValueError: a parameter is not a matrix, or its G has another size.
    """

    LEAST = 0.1  # size of a column, as a share of that of all Ĉ: where C does nothing yet, it must learn too
    FLOOR = 1e-6  # least eigenvalue of G, as a share of the mean: what hardly ever occurs must not take large steps

    def __init__(
        self,
        grams: Mapping[nn.Parameter, torch.Tensor],
        lr: float = 5e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        others: Iterable[nn.Parameter] = (),
    ) -> None:
        readers: dict[int, list[nn.Parameter]] = {}
        for parameter, gram in grams.items():
            if parameter.ndim != 2 or gram.shape != (parameter.shape[1],) * 2:
                raise ValueError(f"grams: {tuple(gram.shape)} does not fit a parameter {tuple(parameter.shape)}")
            readers.setdefault(id(gram), []).append(parameter)
        groups = []
        for parameters in readers.values():
            forth, back = self._turn(parameters, grams[parameters[0]])
            for parameter in parameters:
                power = (parameter.detach().double() @ forth).square().mean(0)  # of each column of Ĉ
                size = power.clamp_min(self.LEAST**2 * power.mean()).sqrt()
                step = (size[:, None] * back).to(parameter.dtype)
                groups.append({"params": [parameter], "whitener": back.T.to(parameter.dtype), "step": step})
        if others := list(others):
            groups.append({"params": others})
        super().__init__(groups, lr, betas, eps, weight_decay=0.0)

    @classmethod
    def _turn(cls, parameters: list[nn.Parameter], gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """T = G^½ V, which makes Ĉ = C T of all these parameters, and its inverse."""
        values, vectors = torch.linalg.eigh(gram.double())
        roots = values.clamp_min(cls.FLOOR * values.mean()).sqrt()
        whitened = torch.cat([p.detach().double() for p in parameters]) @ (vectors * roots)  # C G^½ up to a rotation
        rotation = torch.linalg.eigh(whitened.T @ whitened)[1]
        return (vectors * roots) @ rotation, rotation.T @ (vectors / roots).T

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters once; `closure` re-evaluates the model and returns the loss, as in torch."""
        loss = loss_of(closure)
        whitened = [group for group in self.param_groups if "whitener" in group]
        moved = [(group, p, p.clone()) for group in whitened for p in group["params"] if p.grad is not None]
        for group, parameter, _ in moved:
            parameter.grad = parameter.grad @ group["whitener"]  # of Ĉ
        super().step()
        for group, parameter, before in moved:
            parameter.copy_(before + (parameter - before) @ group["step"])
        return loss
