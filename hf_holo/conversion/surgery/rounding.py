"""Rounding matrices to small integers so that their products with the inputs of a text change little.

1. The errors that are already made in a row are made up for by its columns that are still to be rounded, as in GPTQ
   (Frantar et al., 2022, https://arxiv.org/abs/2210.17323; after Optimal Brain Surgeon, Hassibi and Stork, 1992).
2. A pivoted basis passes R inputs on as they are and adds mixtures of the others to them. Where an input that is much
   larger than the others is among the mixed ones, it is added everywhere, and the coefficients take it away again:
   small errors on both sides become large ones. So the inputs that are passed on are chosen again, large ones first.
3. The basis is rounded first; the coefficients are then fitted to the rounded basis, and rounded.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ...modeling.harmonics import HarmonicBasis, HoloLinear
from ...modeling.integers import GROUP, LARGEST, IntegerMatrix, scales_for

DAMPING = 0.01  # of the mean square of each input, added to it: for directions that the text hardly shows
RIDGE = 1e-6  # likewise where coefficients are fitted
BLOCK = 128  # columns after which all others learn of the errors; a multiple of GROUP


@torch.no_grad()
def round_thin(layers: Sequence[HoloLinear], gram: torch.Tensor, kind: str) -> None:
    """Store holographic layers with one basis in integers.

    No tensor is written to: new ones take their places.

    Args:
        layers: all that use the basis.
        gram: E[x xᵀ] `[I, I]` of their input.
        kind: "int8" or "int4".
    """
    basis, gram = layers[0].basis, gram.double()
    exact = basis.matrix().double()
    _round_basis(basis, exact, gram, kind)
    stored = basis.matrix().double()
    image = gram @ stored.T  # E[x hᵀ]
    seen = stored @ image  # E[h hᵀ]
    ridge = RIDGE * seen.diagonal().diag()
    for layer in layers:
        dtype, coefficients = layer.dtype, layer.effective_coefficients().double()
        fitted = torch.linalg.solve(seen + ridge, image.T @ exact.T @ coefficients.T).T
        layer.fold()
        layer.unmerge()
        del layer.coefficients
        layer.coefficients = rounded(fitted.to(torch.promote_types(dtype, torch.float32)), seen, kind, dtype)


def _round_basis(basis: HarmonicBasis, exact: torch.Tensor, gram: torch.Tensor, kind: str) -> None:
    """What is stored of a basis in integers; its rows may be mixed. One that is not stored stays."""
    if basis.kind != "data":
        return
    dtype, harmonics = basis.dtype, basis.harmonics
    if not basis.pivoted:
        del basis.table
        basis.table = rounded(exact, gram, kind, dtype)
    elif harmonics < basis.in_features:
        order = order_of_inputs(exact, gram)
        rest = order[harmonics:]
        tail = torch.linalg.solve(exact[:, order[:harmonics]], exact[:, rest])
        basis.order = order.to(basis.order.dtype)
        del basis.tail
        basis.tail = rounded(tail, gram[rest][:, rest], kind, dtype)


def order_of_inputs(matrix: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """An order of the inputs of a basis `[R, I]`: the R first are passed on as they are.

    They are chosen by LU with row pivoting of the transpose, in which each input counts by its size in the text. Both
    parts are then sorted, so that those which matter most are rounded first, and next to others that matter as much.
    """
    harmonics, sizes = len(matrix), gram.diagonal().sqrt()
    permutation, _, _ = torch.linalg.lu((matrix * sizes).T)
    order = permutation.argmax(0)
    first, rest = order[:harmonics], order[harmonics:]
    mixing = torch.linalg.solve(matrix[:, first], matrix)  # h = mixing · x
    strength = ((mixing @ gram) * mixing).sum(1)
    return torch.cat([first[strength.argsort(descending=True)], rest[sizes[rest].argsort(descending=True)]])


@torch.no_grad()
def rounded(matrix: torch.Tensor, gram: torch.Tensor, kind: str, dtype: torch.dtype | None = None) -> IntegerMatrix:
    """The matrix in integers.

    Args:
        matrix: W `[O, I]`.
        gram: E[x xᵀ] `[I, I]` of its inputs, up to a factor.
        kind: "int8" or "int4".
        dtype: that it stands for; default: that of the matrix.

    Raises:
        ValueError: a value is not finite, or too large for a scale.
    """
    new = IntegerMatrix(len(matrix), matrix.shape[1], kind, matrix.device, dtype or matrix.dtype)
    weight = F.pad(matrix.double(), (0, new.padding))
    factor = _inverse_factor(F.pad(gram.double(), (0, new.padding, 0, new.padding)))
    columns = weight.shape[1]
    integers, found = torch.zeros_like(weight), []
    if kind == "int8":
        found.append(scales_for(weight, kind))
    for begin in range(0, columns, BLOCK):
        end = min(begin + BLOCK, columns)
        errors = torch.zeros_like(weight[:, begin:end])
        for column in range(begin, end):
            if kind == "int4" and column % GROUP == 0:
                found.append(scales_for(weight[:, column : column + GROUP], kind))
            scale = found[-1].double()
            integers[:, column] = (weight[:, column] / scale).round().clamp(-LARGEST[kind], LARGEST[kind])
            error = (weight[:, column] - integers[:, column] * scale) / factor[column, column]
            weight[:, column + 1 : end] -= torch.outer(error, factor[column, column + 1 : end])
            errors[:, column - begin] = error
        weight[:, end:] -= errors @ factor[begin:end, end:]
    new.put(integers, torch.stack(found, -1))
    return new


def _inverse_factor(gram: torch.Tensor) -> torch.Tensor:
    """The upper U with (gram + damping)⁻¹ = Uᵀ U. An input that is always zero counts as one of size one."""
    sizes = gram.diagonal()
    damped = gram + torch.where(sizes > 0, DAMPING * sizes, 1).diag()
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
