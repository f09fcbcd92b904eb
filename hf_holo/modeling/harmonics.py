"""HoloLinear: a linear layer with a fixed harmonic basis and learned amplitudes and phases; sine activations.

y = (A · cos Φ) B x + bias: B [R, I] is a fixed basis of R harmonics over the inputs, A and Φ [O, R] are learned. Two
thin products compute it; nothing larger than [tokens, max(R, O)] is ever made.
"""

import math
import operator
import weakref
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .computed_weight import ComputedWeight
from .integers import IntegerMatrix, as_tensor, multiply, tensors_of
from .recording import exporting
from .validation import check_choice, check_positive

BASES = ("random", "dct", "golden", "data")
COMPLETE = ("dct", "data")  # bases that end: as many rows as inputs are all there are
GOLDEN = (math.sqrt(5) - 1) / 2
START_PHASE = math.pi / 4  # where folded coefficients are unfolded: cos Φ and its slope are equal, neither vanishes


def harmonic_basis(kind: str, harmonics: int, in_features: int, seed: int = 0) -> np.ndarray:
    """A basis that is a function of its arguments alone: the same values on every device and in every release.

    - "random": independent uniform entries, from the raw integers of numpy's Philox generator, which are fixed for
      ever (NEP 19), by exact arithmetic;
    - "dct": the cosines of the DCT-II, from low to high frequency;
    - "golden": cosines whose frequencies are spread by the golden ratio, so that any number covers the range evenly.

    Args:
        kind: "random", "dct" or "golden".
        harmonics: rows R.
        in_features: columns I.
        seed: of "random", in [0, 2^64).

    Returns:
        `[R, I]`, float64, rows of norm one (of norm one on average for "random").
    """
    if kind == "random":
        integers = np.random.Philox(key=seed).random_raw(harmonics * in_features)
        uniform = (integers >> np.uint64(11)).astype(np.float64) * 2.0**-53  # [0, 1)
        return ((2 * uniform - 1) * math.sqrt(3 / in_features)).reshape(harmonics, in_features)
    k = np.arange(harmonics)[:, None]
    frequency = k / in_features if kind == "dct" else (k + 1) * GOLDEN % 1
    waves = np.cos(np.pi * frequency * (np.arange(in_features) + 0.5))
    return waves / np.linalg.norm(waves, axis=1, keepdims=True)


def named_seed(seed: int, name: str) -> int:
    """A seed of its own for the module `name`, so that no two layers of a model share their random basis."""
    return (seed << 32 | zlib.crc32(name.encode())) % 2**64


def harmonic_linear(
    h: torch.Tensor, amplitude: torch.Tensor, phase: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Superpose harmonics with their amplitudes and phases: y = (A · cos Φ) h + bias.

    Args:
        h: `[..., R]`, the input in the harmonic basis.
        amplitude, phase: `[O, R]`.
        bias: `[O]` or None.

    Returns:
        `[..., O]`.
    """
    return F.linear(h, amplitude * phase.cos(), bias)


def harmonic_linear_naive(
    h: torch.Tensor, amplitude: torch.Tensor, phase: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Twin of [`harmonic_linear`]: every harmonic of every output, `[..., O, R]`, and then their sum."""
    y = (amplitude * phase.cos() * h[..., None, :]).sum(-1)
    return y if bias is None else y + bias


class LastProduct:
    """The product of a basis and the input that it saw last, for the other layers that read this input next.

    Queries, keys and values share a basis and are computed one after the other from the same tensor. Only where no
    gradients are recorded; it holds no longer than the input lives and is not written to. Copies begin with nothing.
    """

    def __init__(self) -> None:
        self._held: tuple[Any, ...] | None = None

    def get(
        self, compute: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, tables: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """`compute(x)`, or what it gave for this very tensor; `tables` are all else that it depends on."""
        # a tensor of inference mode does not count what is written to it
        if torch.is_grad_enabled() or exporting() or torch.is_inference(x) or type(x) is not torch.Tensor:
            return compute(x)
        device = x.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        held, key = self._held, (autocast, *(y._version for y in (x, *tables)))
        same = held is not None and held[0]() is x and held[1] == key and all(map(operator.is_, held[2], tables))
        if held is None or not same:
            held = self._held = weakref.ref(x, self._drop), key, tables, compute(x)
        return held[3]

    def _drop(self, reference: Any) -> None:
        held = self._held
        if held is not None and held[0] is reference:
            self._held = None

    def __deepcopy__(self, memo: dict) -> "LastProduct":
        return LastProduct()

    def __reduce__(self) -> tuple[type, tuple]:
        return LastProduct, ()


class HarmonicBasis(nn.Module):
    """The fixed basis of one or several [`HoloLinear`] layers that read the same input.

    "random", "dct" and "golden" are recomputed whenever the module is built, moved or cast: they cost no storage and
    lose no precision. A "data" basis is fitted to activations and stored; pivoted, as the tail T of [I | T] and the
    order of the inputs, which saves R² values (every basis of full rank can be written so).

    Args:
        in_features, harmonics, kind, seed: as in [`harmonic_basis`].
        pivoted: store a "data" basis pivoted.

    Attributes:
        checksum: of the values of a basis that was made, to about six digits; None for one that is stored.

    Raises:
        ValueError: an unknown kind, harmonics below 1 or, for "dct" and "data", above in_features, an invalid seed,
            or pivoted without a "data" basis.
    """

    table: Any  # a tensor, or an IntegerMatrix
    tail: Any  # likewise
    order: torch.Tensor

    def __init__(
        self,
        in_features: int,
        harmonics: int,
        kind: str = "random",
        seed: int = 0,
        pivoted: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("basis", kind, BASES)
        check_positive(in_features=in_features, harmonics=harmonics)
        if harmonics > in_features and kind in COMPLETE:
            raise ValueError(
                f"harmonics: {harmonics} is more than in_features={in_features}; use at most {in_features}, all that "
                f"basis={kind!r} has, or basis='random'"
            )
        if not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise ValueError(f"seed: {seed!r} is not a whole number in [0, 2^64)")
        if pivoted and kind != "data":
            raise ValueError(f"pivoted: True needs basis='data', not basis={kind!r}: other bases cost no storage")
        self.in_features, self.harmonics, self.kind, self.seed, self.pivoted = (
            in_features,
            harmonics,
            kind,
            seed,
            pivoted,
        )
        if pivoted:
            self.register_buffer("tail", torch.zeros(harmonics, in_features - harmonics, device=device, dtype=dtype))
            self.register_buffer("order", torch.arange(in_features, device=device, dtype=torch.int32))
        else:
            table = torch.zeros(harmonics, in_features, device=device, dtype=dtype)
            self.register_buffer("table", table, persistent=kind == "data")
        self.checksum: int | None = None
        self.last: LastProduct | None = None  # where several layers read it, see `share`
        self.regenerate()

    def share(self) -> "HarmonicBasis":
        """The basis, for one more layer that reads the same input."""
        self.last = self.last or LastProduct()
        return self

    @torch.no_grad()
    def regenerate(self, device: torch.device | None = None) -> None:
        """Compute the values of a basis that is not stored, on `device` (default: where it is)."""
        device = device or next(self.buffers()).device
        if self.kind != "data" and device.type != "meta":
            numbers = harmonic_basis(self.kind, self.harmonics, self.in_features, self.seed)
            self.checksum = zlib.crc32(np.rint(numbers * 2**20).astype(np.int64).tobytes())
            self.table = torch.from_numpy(numbers).to(device, self.table.dtype)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "HarmonicBasis":
        super()._apply(fn, recurse)  # .to(), .half(), .cuda(), .to_empty(): a cast there and back would round
        self.regenerate()
        return self

    @property
    def dtype(self) -> torch.dtype:
        return (self.tail if self.pivoted else self.table).dtype

    def matrix(self) -> torch.Tensor:
        """The basis as one matrix `[R, I]`."""
        if not self.pivoted:
            return as_tensor(self.table)
        tail = as_tensor(self.tail)
        ordered = torch.cat([torch.eye(self.harmonics, dtype=tail.dtype, device=tail.device), tail], 1)
        return torch.empty_like(ordered).index_copy(1, self.order.long(), ordered)

    @torch.no_grad()
    def store(self, matrix: torch.Tensor) -> torch.Tensor:
        """Store a "data" basis `[R, I]`.

        Returns:
            `[R, R]` X, so that coefficients C for `matrix` become C X for what is stored. The identity unless pivoted:
            there the basis is written as X [I | T] with the inputs reordered (LU with row pivoting of the transpose,
            so that no number in T grows large).
        """
        if not self.pivoted:
            self.table.copy_(matrix)
            return torch.eye(self.harmonics, dtype=matrix.dtype, device=matrix.device)
        permutation, lower, upper = torch.linalg.lu(matrix.T)  # Bᵀ = P L U
        head, rest = lower[: self.harmonics], lower[self.harmonics :]
        tail = torch.linalg.solve_triangular(head, rest, upper=False, left=False, unitriangular=True)  # L₂ L₁⁻¹
        self.tail.copy_(tail.T)
        self.order.copy_(permutation.argmax(0))
        return (head @ upper).T

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., I]` to `[..., R]`, in the dtype of the input: casts that look at parameters alone miss a basis."""
        if self.last is None:
            return self._product(x)
        tables = [*tensors_of(self.tail), self.order] if self.pivoted else tensors_of(self.table)
        return self.last.get(self._product, x, tables)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        if not self.pivoted:
            return multiply(x, self.table)
        x = x.index_select(-1, self.order)
        return x[..., : self.harmonics] + multiply(x[..., self.harmonics :], self.tail)

    def to_integers(self, kind: str) -> None:
        """Store a "data" basis in small integers, see [`IntegerMatrix`]; other bases are not stored, and stay."""
        name = "tail" if self.pivoted else "table"
        table = self._buffers.get(name)
        if self.kind == "data" and table is not None and table.numel():
            delattr(self, name)
            setattr(self, name, IntegerMatrix.of(table, kind))

    def stored_numbers(self) -> int:
        """How many values a checkpoint keeps for it."""
        if self.kind != "data":
            return 0
        return self.tail.numel() + self.order.numel() if self.pivoted else self.table.numel()

    def extra_repr(self) -> str:
        return f"{self.in_features}, harmonics={self.harmonics}, kind={self.kind!r}" + ", pivoted" * self.pivoted


class HoloLinear(nn.Linear):
    """y = (A · cos Φ) B x + bias, with a fixed basis B and learned amplitudes A and phases Φ (HOLO).

    It is an `nn.Linear` to everybody who asks (PEFT, exporters); its `weight` is computed and cannot be written to.
    Its dtype is that of its coefficients, which the input must have too; the basis may be kept in another.

    Args:
        in_features, out_features: I and O.
        harmonics: R. More than I are possible with "random" and "golden", as in HOLO-PyTorch's first layers of two
            inputs; the layer computes nothing more with them, but trains differently.
        basis: "random", "dct", "golden" or "data", see [`harmonic_basis`]; or a [`HarmonicBasis`] that another layer
            with the same input owns and saves.
        bias: add a learned bias.
        seed: of the random basis.
        folded: keep only the product C = A · cos Φ as a parameter. Half the values; what a fitted layer stores.
        pivoted: see [`HarmonicBasis`].

    Attributes:
        dense_class: of the layer whose place it took, which `restore_linears` puts back: `nn.Linear` or `Conv1D`.
        loading: a checkpoint is being read; there is no weight yet, and what initialises one is not heard.

    Raises:
        ValueError: as [`HarmonicBasis`].
    """

    dense_class: type[nn.Module] = nn.Linear
    loading: bool = False
    coefficients: Any  # an nn.Parameter, or an IntegerMatrix
    amplitude: nn.Parameter
    phase: nn.Parameter
    bias: nn.Parameter | None  # type: ignore[assignment]  # torch declares none that is None
    merged: torch.Tensor | None
    own_basis: HarmonicBasis

    def __init__(
        self,
        in_features: int,
        out_features: int,
        harmonics: int,
        basis: "str | HarmonicBasis" = "random",
        bias: bool = True,
        seed: int = 0,
        folded: bool = False,
        pivoted: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which would make a weight
        check_positive(out_features=out_features)
        self.in_features, self.out_features, self.harmonics = in_features, out_features, harmonics
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        if isinstance(basis, HarmonicBasis):
            self._lent = (basis.share(),)  # in a tuple it is no submodule: a second owner would break saving
        else:
            self.own_basis = HarmonicBasis(in_features, harmonics, basis, seed, pivoted, **made)
        for name in ("coefficients",) if folded else ("amplitude", "phase"):
            self.register_parameter(name, nn.Parameter(torch.empty(out_features, harmonics, **made)))
        self.bias = nn.Parameter(torch.empty(out_features, **made)) if bias else None
        self.register_buffer("merged", None, persistent=False)
        self.reset_parameters()

    @property
    def basis(self) -> HarmonicBasis:
        return self.own_basis if "own_basis" in self._modules else self._lent[0]

    @property
    def folded(self) -> bool:
        """Whether A · cos Φ is one matrix."""
        return "amplitude" not in self._parameters

    @property
    def kind(self) -> str | None:
        """Of the small integers that the coefficients are in, "int8" or "int4"; else None."""
        return self.coefficients.kind if self.folded and isinstance(self.coefficients, IntegerMatrix) else None

    @property
    def dtype(self) -> torch.dtype:
        """Of the coefficients; of those in small integers, the one that they stand for."""
        return (self.coefficients if self.folded else self.amplitude).dtype

    def reset_parameters(self) -> None:
        """Random amplitudes and phases: inputs of variance one give outputs of variance one half."""
        if self.folded:
            nn.init.normal_(self.coefficients, std=(2 * self.harmonics) ** -0.5)
        else:
            nn.init.normal_(self.amplitude, std=self.harmonics**-0.5)
            nn.init.uniform_(self.phase, -math.pi, math.pi)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def effective_coefficients(self) -> torch.Tensor:
        """C = A · cos Φ, `[O, R]`."""
        return as_tensor(self.coefficients) if self.folded else self.amplitude * self.phase.cos()

    def dense_matrix(self) -> torch.Tensor:
        """C B `[O, I]`, in the dtype of the coefficients."""
        coefficients = self.effective_coefficients()
        return coefficients @ self.basis.matrix().to(coefficients.dtype)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]  # computed
        """The dense matrix `[O, I]` that the layer stands for. Computed: writing to it raises TypeError; freezing it
        freezes what it is computed from."""
        if self.loading:
            return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")
        weight = (self.dense_matrix() if self.merged is None else self.merged).as_subclass(ComputedWeight)
        names = ("coefficients", "amplitude", "phase")
        weight.factors = [self._parameters[name] for name in names if name in self._parameters]  # type: ignore[misc]
        return weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., I]` to `[..., O]`."""
        if self.merged is not None:
            return F.linear(x, self.merged, self.bias)
        if self.folded:
            h, coefficients = self.basis(x), self.coefficients
            integers = isinstance(coefficients, IntegerMatrix)
            return coefficients(h, self.bias) if integers else F.linear(h, coefficients, self.bias)
        return harmonic_linear(self.basis(x), self.amplitude, self.phase, self.bias)

    @torch.no_grad()
    def merge(self) -> None:
        """Compute with one dense matrix from now on, for inference; nothing that is saved changes.

        Training mode and newly loaded weights put an end to it, since the matrix would no longer be theirs.
        """
        self.merged = self.dense_matrix().detach()

    def unmerge(self) -> None:
        """Compute with the thin factors again."""
        self.merged = None

    def train(self, mode: bool = True) -> "HoloLinear":
        if mode:
            self.unmerge()
        return super().train(mode)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)

    @torch.no_grad()
    def fold(self) -> None:
        """Replace amplitudes and phases by their product."""
        if not self.folded:
            product = nn.Parameter(self.effective_coefficients())
            del self.amplitude, self.phase
            self.coefficients = product

    @torch.no_grad()
    def unfold(self) -> None:
        """Replace the product by amplitudes and phases of π/4, so that both can be trained.

        Raises:
            TypeError: it is in small integers.
        """
        if isinstance(self.coefficients if self.folded else None, IntegerMatrix):
            raise TypeError(f"coefficients: in {self.kind} they cannot be trained; unfold before they are quantized")
        if self.folded:
            amplitude = nn.Parameter(self.coefficients / math.cos(START_PHASE))
            phase = nn.Parameter(torch.full_like(self.coefficients, START_PHASE))
            del self.coefficients
            self.amplitude, self.phase = amplitude, phase

    def to_integers(self, kind: str) -> None:
        """Fold, and store coefficients and a basis of its own in small integers, for inference.

        Args:
            kind: "int8" or "int4", see [`IntegerMatrix`].
        """
        self.fold()
        if self.kind is None:
            self.unmerge()
            self.coefficients = IntegerMatrix.of(self._parameters.pop("coefficients"), kind)  # type: ignore[arg-type]
        if "own_basis" in self._modules:
            self.own_basis.to_integers(kind)

    @torch.no_grad()
    def load_factors(self, coefficients: torch.Tensor, basis: torch.Tensor | None = None) -> None:
        """Set what the layer computes.

        Args:
            coefficients: C `[O, R]`, for `basis` or, without one, for the basis as [`HarmonicBasis.store`] has it.
            basis: B `[R, I]` to store; only in the layer that owns a "data" basis.
        """
        if basis is not None:
            coefficients = coefficients @ self.basis.store(basis)
        self.unmerge()
        if self.folded:
            self.coefficients.copy_(coefficients)
        else:
            self.amplitude.copy_(coefficients / math.cos(START_PHASE))
            self.phase.fill_(START_PHASE)

    def count_numbers(self) -> dict[str, int]:
        """How many values the layer takes, by what one counts.

        Returns:
            "stored": in a checkpoint (with a basis of its own, if that is stored); "trained": parameters; "folded":
            stored after [`fold`]; "dense": of the `nn.Linear` in its place, which is also what [`merge`] computes with.
        """
        bias = 0 if self.bias is None else self.out_features
        thin = self.out_features * self.harmonics
        own = self.own_basis.stored_numbers() if "own_basis" in self._modules else 0
        integers = thin if self.kind is not None else 0
        trained = sum(parameter.numel() for parameter in self._parameters.values() if parameter is not None)
        dense = self.out_features * self.in_features + bias
        return {"stored": trained + integers + own, "trained": trained, "folded": thin + bias + own, "dense": dense}

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, harmonics={self.harmonics}, basis={self.basis.kind!r}, "
            f"bias={self.bias is not None}" + ", folded" * self.folded
        )


class SineActivation(nn.Module):
    """sin(ω x), and how to initialise the linear layer before it (SIREN, Sitzmann et al., 2020).

    Args:
        frequency: ω, in radians per unit of input.

    Raises:
        ValueError: `frequency` is not positive.
    """

    def __init__(self, frequency: float = 30.0) -> None:
        super().__init__()
        if not frequency > 0:
            raise ValueError(f"frequency: {frequency!r} is not positive")
        self.frequency = frequency

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(self.frequency * x)

    @torch.no_grad()
    def init_linear_(self, linear: nn.Linear, first: bool = False) -> nn.Linear:
        """Initialise the layer that feeds this activation.

        Args:
            linear: an `nn.Linear` or a [`HoloLinear`], whose coefficients are scaled to the same spread.
            first: it reads raw coordinates in [-1, 1], and is to span `frequency`.
        """
        fan_in = linear.in_features
        bound = 1 / fan_in if first else math.sqrt(6 / fan_in) / self.frequency
        if isinstance(linear, HoloLinear):
            std = bound / math.sqrt(3) * math.sqrt(fan_in / linear.harmonics)  # of C, since B has entries of 1/√I
            if linear.folded:
                nn.init.normal_(linear.coefficients, std=std)
            else:
                nn.init.normal_(linear.amplitude, std=std * math.sqrt(2))
                nn.init.uniform_(linear.phase, -math.pi, math.pi)
        else:
            nn.init.uniform_(linear.weight, -bound, bound)
        if linear.bias is not None:
            nn.init.uniform_(linear.bias, -math.pi / self.frequency, math.pi / self.frequency)
        return linear

    def extra_repr(self) -> str:
        return f"frequency={self.frequency}"
