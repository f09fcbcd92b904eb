"""Matrices in small integers, for the linear layers of converted checkpoints: 8 or 4 bits a value, and scales.

- "int8": one scale for each row, integers from -127 to 127;
- "int4": one scale for each 32 values of a row, integers from -7 to 7, two in a byte (the first in the lower half).

Both are symmetric: W ≈ scale · integer, no value is off by more than half a scale. Scales are bfloat16, rounded up.

A few tokens on a CPU are multiplied by the kernels of PyTorch that read the integers themselves, which is faster than
with float32 weights because less is read. They round their inputs and outputs to bfloat16 (by 0.2 % at most) and add up
in float32. Everything else, longer texts above all, multiplies with a matrix that is made of the integers each time.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from .computed_weight import ComputedWeight
from .recording import exporting
from .validation import check_choice, check_positive

BITS = {"int8": 8, "int4": 4}
KINDS = tuple(BITS)
LARGEST = {kind: 2 ** (bits - 1) - 1 for kind, bits in BITS.items()}
GROUP = 32  # values of a row that share a scale in int4
COLUMNS = {"int8": 16, "int4": GROUP}  # that the kernels read at a time: zeros fill them up to a multiple
ROWS = 16  # likewise of the int4 kernel, in its own copy
FEW = 8  # tokens, up to which the kernels are faster than a matrix that is made first
SCALE = torch.bfloat16
ALIGNMENT = 64  # bytes


class IntegerMatrix(nn.Module):
    """A matrix W `[O, I]` in small integers. It is no parameter: nothing can train it.

    Args:
        out_features, in_features: O and I.
        kind: "int8" or "int4".
        device: of the integers.
        dtype: that the matrix stands for, of [`matrix`].

    Attributes:
        values: `[O, I']` int8, or `[O, I' / 2]` uint8 for int4; I' is I rounded up to a multiple of 16 or 32.
        scales: `[O]` or, for int4, `[O, I' / 32]`, in bfloat16.

    Raises:
        ValueError: an unknown kind, or a size below 1.
    """

    values: torch.Tensor
    scales: torch.Tensor

    def __init__(
        self,
        out_features: int,
        in_features: int,
        kind: str,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("kind", kind, KINDS)
        check_positive(out_features=out_features, in_features=in_features)
        self.out_features, self.in_features, self.kind = out_features, in_features, kind
        self.dtype = dtype or torch.get_default_dtype()
        self.padding = -in_features % COLUMNS[kind]
        columns = in_features + self.padding
        if kind == "int8":
            values = torch.zeros(out_features, columns, dtype=torch.int8, device=device)
            scales: tuple[int, ...] = (out_features,)
        else:
            values = torch.zeros(out_features, columns // 2, dtype=torch.uint8, device=device)
            scales = out_features, columns // GROUP
        self.register_buffer("values", values)
        self.register_buffer("scales", torch.zeros(scales, dtype=SCALE, device=device))
        self._packed: tuple[torch.Tensor, torch.Tensor] | None = None

    @classmethod
    def of(cls, matrix: torch.Tensor, kind: str) -> "IntegerMatrix":
        """The nearest to this matrix `[O, I]`; on the meta device, of its shape."""
        new = cls(len(matrix), matrix.shape[1], kind, matrix.device, matrix.dtype)
        if not matrix.is_meta:
            new.store(matrix)
        return new

    @torch.no_grad()
    def store(self, matrix: torch.Tensor) -> None:
        """Round a matrix `[O, I]` to the nearest integers.

        Raises:
            ValueError: a value is not finite, or too large for a scale.
        """
        grouped = self._grouped(F.pad(matrix.detach().double(), (0, self.padding)))
        scales = scales_for(grouped, self.kind)
        self.put((grouped / scales.double()[..., None]).round().flatten(-2), scales)

    @torch.no_grad()
    def put(self, integers: torch.Tensor, scales: torch.Tensor) -> None:
        """Take over integers `[O, I']` and their scales `[O, I' / 32]`, of int8 `[O, 1]`."""
        self.scales.copy_(scales.view_as(self.scales))
        if self.kind == "int8":
            self.values.copy_(integers)
        else:
            pairs = (integers + 8).to(torch.uint8).unflatten(-1, (-1, 2))
            self.values.copy_(pairs[..., 0] | pairs[..., 1] << 4)
        self._packed = None

    def _grouped(self, matrix: torch.Tensor) -> torch.Tensor:
        """`[O, I']` with a dimension for the values that share a scale at the end."""
        return matrix.unflatten(-1, (-1, GROUP if self.kind == "int4" else matrix.shape[-1]))

    def integers(self) -> torch.Tensor:
        """`[O, I']` int8."""
        if self.kind == "int8":
            return self.values
        halves = torch.stack([self.values & 15, self.values >> 4], -1).flatten(-2)
        return halves.to(torch.int8) - 8

    def matrix(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """`[O, I]`, in this dtype (default: that of the matrix)."""
        dtype = dtype or self.dtype
        scales = self.scales.to(dtype).view(self.out_features, -1, 1)
        return (self._grouped(self.integers().to(dtype)) * scales).flatten(-2)[:, : self.in_features]

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """W x + bias: `[..., I]` to `[..., O]`, in the dtype of the input."""
        if not self._suits_kernel(x):
            return F.linear(x, self.matrix(x.dtype), bias)
        rows = F.pad(x, (0, self.padding)) if self.padding else x
        y = self._kernel(_aligned(rows.reshape(-1, rows.shape[-1]).to(torch.bfloat16).contiguous())).to(x.dtype)
        y = y.unflatten(0, x.shape[:-1]) if x.dim() != 2 else y
        return y if bias is None else y + bias

    def _suits_kernel(self, x: torch.Tensor) -> bool:
        """Whether the kernels can multiply it, and are faster; they have no gradient and no form in exported graphs."""
        tokens = x.numel() // x.shape[-1]
        few = x.is_cpu and x.itemsize <= 4 and 0 < tokens <= FEW
        return few and not exporting() and not (torch.is_grad_enabled() and x.requires_grad)

    def _kernel(self, x: torch.Tensor) -> torch.Tensor:
        """`[N, I']` to `[N, O]`, in bfloat16."""
        if self.kind == "int8":
            self.values = _aligned(self.values)
            return torch._weight_int8pack_mm(x, self.values, self.scales)
        if self._packed is None:
            self._packed = self._pack()
        return torch._weight_int4pack_mm_for_cpu(x, self._packed[0], GROUP, self._packed[1])[:, : self.out_features]

    @torch.no_grad()
    def _pack(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The integers in the order that the int4 kernel of this processor reads, `[O', I' / 2]`, and scales with zero
        points `[I' / 32, O', 2]`; O' is O rounded up to a multiple of 16. They are not saved."""
        more = -self.out_features % ROWS
        integers = F.pad(self.integers().int() + 8, (0, 0, 0, more), value=8)
        scales = F.pad(self.scales, (0, 0, 0, more)).T
        packed = torch._convert_weight_to_int4pack_for_cpu(integers, 1)
        return packed, torch.stack([scales, torch.zeros_like(scales)], -1).contiguous()

    def settle(self) -> None:
        """Bring the scales back to their type: transformers 4.57 reads them in that of the model.

        Raises:
            ValueError: one is not finite.
        """
        self.scales, self._packed = self.scales.to(SCALE), None
        if not self.scales.is_meta and not self.scales.isfinite().all():
            raise ValueError("scales: NaN or infinity; the file is damaged")

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "IntegerMatrix":
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(fn, recurse)
        self.scales, self._packed = self.scales.to(SCALE), None
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._packed = None
        super()._load_from_state_dict(*args, **kwargs)

    def numel(self) -> int:
        """O · I."""
        return self.out_features * self.in_features

    def extra_repr(self) -> str:
        return f"{self.out_features}, {self.in_features}, {self.kind}"


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """The tensor at an address that the int8 kernel can read from: it crashes at others, where files put tensors."""
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def scales_for(groups: torch.Tensor, kind: str) -> torch.Tensor:
    """The scales `[...]` in bfloat16 with which values `[..., G]` reach the largest integer and do not exceed it; 1 for
    zeros alone.

    Raises:
        ValueError: a value is not finite, or too large for a scale.
    """
    exact = groups.abs().amax(-1) / LARGEST[kind]
    scales = exact.to(SCALE)
    scales = torch.where(scales.double() < exact, torch.nextafter(scales, torch.full_like(scales, torch.inf)), scales)
    if not scales.isfinite().all():
        raise ValueError(f"matrix: a value is not finite, or too large to be stored in {kind}")
    return torch.where(scales > 0, scales, 1)


class IntegerWeight(ComputedWeight):
    """The weight of an [`IntegerLinear`]."""

    layer = "IntegerLinear"


class IntegerLinear(nn.Linear):
    """A linear layer whose weight is in small integers, for inference. Its `weight` is computed, as that of a
    [`HoloLinear`]; the bias stays.

    Args:
        in_features, out_features, kind, device, dtype: as in [`IntegerMatrix`].
        bias: it has one.

    Attributes:
        dense_class: of the layer whose place it took: `nn.Linear` or `Conv1D`.
        loading: a checkpoint is being read, and what initialises a weight is not heard.
    """

    dense_class: type[nn.Module] = nn.Linear
    loading: bool = False
    bias: nn.Parameter | None  # type: ignore[assignment]  # torch declares none that is None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kind: str,
        bias: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would make a weight
        self.in_features, self.out_features = in_features, out_features
        self.integers = IntegerMatrix(out_features, in_features, kind, device, dtype)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def like(cls, layer: nn.Module, kind: str) -> "IntegerLinear":
        """In place of a dense layer, `nn.Linear` or `Conv1D`; with its bias, and with its weights unless on meta."""
        weight: Any = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
        outputs, inputs = weight.shape
        new = cls(inputs, outputs, kind, layer.bias is not None, weight.device, weight.dtype)
        new.dense_class = Conv1D if isinstance(layer, Conv1D) else nn.Linear
        if not weight.is_meta:
            new.integers.store(weight)
        if layer.bias is not None:
            new.bias = layer.bias  # type: ignore[assignment]
        return new.train(layer.training)

    def dense_matrix(self) -> torch.Tensor:
        """`[O, I]`."""
        return self.integers.matrix()

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]  # computed
        """The matrix `[O, I]`. Computed: writing to it raises TypeError."""
        if self.loading:
            return torch.empty(self.out_features, self.in_features, dtype=self.integers.dtype, device="meta")
        return self.dense_matrix().as_subclass(IntegerWeight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., I]` to `[..., O]`."""
        return self.integers(x, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


# A factor that is a tensor or in small integers ----------------------------------------------------------------------


def multiply(x: torch.Tensor, matrix: "torch.Tensor | IntegerMatrix") -> torch.Tensor:
    """matrix · x, `[..., I]` to `[..., O]`, in the dtype of x."""
    return matrix(x) if isinstance(matrix, IntegerMatrix) else F.linear(x, matrix.to(x.dtype))


def as_tensor(matrix: "torch.Tensor | IntegerMatrix") -> torch.Tensor:
    """The matrix `[O, I]` itself."""
    return matrix.matrix() if isinstance(matrix, IntegerMatrix) else matrix


def tensors_of(matrix: "torch.Tensor | IntegerMatrix") -> list[torch.Tensor]:
    """What it is made of."""
    return [matrix.values, matrix.scales] if isinstance(matrix, IntegerMatrix) else [matrix]
