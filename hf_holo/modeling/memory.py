"""HolographicMemory: key → value pairs bundled into one vector of fixed size, by phasor binding; alone and in a model.

A key is D phases, a value D complex numbers. Binding turns number d by phase d, bundling adds, unbinding turns back.
The result is exact but for the crosstalk of the other pairs, which a clean-up against a codebook removes (Plate, 1995;
in the frequency domain: Plate, 2003). Complex numbers are stored as real vectors of width 2D, real parts first: no
complex dtype is used. Sizes in the shape tags: D dimension, N pairs, K codes; `...` stands for any batch.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .cache import RecurrentLayer
from .chunks import ChunkContext, FadingSum
from .layers import at_least_float32, init_normal_
from .layout import TokenLayout
from .phases import rotate_pairs
from .recording import exporting, full_precision, has_values
from .validation import check_positive

NOISE_FLOOR = 1e-4  # of the energy written: where the estimated crosstalk of a memory that is all explained ends


class HolographicMemory:
    """A key → value store in a state of constant size. It holds nothing itself: state in, state out.

    All of it is differentiable (but for the choice of `cleanup`) and batched: leading dimensions are broadcast. States
    are kept in at least float32, and what is computed from a state has its dtype.

    `dimension` counts phasors, as is usual for Fourier holographic representations: D of them are 2D real numbers, and
    binding them is circular convolution of 2D real numbers, seen in the frequency domain. A value is any real vector of
    width 2D; a codebook of random `phasors` makes best use of the dimension, and [`recall_theory`] says how much that
    is: at D = 1,024 with 1,000 codes, one-shot, 98.8 % of 64 pairs are found and 76.5 % of 128. (Circular convolution,
    [`bind`], needs vectors of 2,048 real numbers for the same; with 1,024 of them D is 512.)

    Args:
        dimension: D, phasors in a key, a value and a state.

    Raises:
        ValueError: `dimension` is not a positive integer; in the methods: a tensor of another width or of complex
            numbers, another number of values or strengths than of keys, a rate outside [0, 1] (of a tensor of rates it
            is seen on the CPU only).

    Example:
        ```python
        memory = HolographicMemory(1024)
        codebook = phasors(6.28 * torch.rand(1000, 1024))     # [K, 2D]: what a value may be
        keys = 6.28 * torch.rand(128, 1024)                   # [N, D]: phases
        stored = torch.randint(1000, (128,))

        state = memory.empty()                                # [2D]
        state = memory.write(state, keys, codebook[stored])
        one_shot = memory.cleanup(memory.read(state, keys), codebook)       # [N]: about 76 % are right
        found = memory.recall(state, keys, codebook).argmax(-1)             # [N]: all are right
        ```
        Keys and values may come from a model: any linear layer gives phases. To replace what a key holds, write the
        difference: `memory.write(state, keys, values - memory.read(state, keys))`.
    """

    def __init__(self, dimension: int | None = None, **unknown: Any) -> None:
        if dimension is None or unknown:
            given = ", ".join(unknown) or "nothing"
            raise TypeError(
                f"dimension: HolographicMemory takes this alone, the phasors of its state, and is given {given}; "
                "for HolographicMemory(pattern_dim=P, hologram_dim=A, capacity=N) of the Resonance reference call "
                "HolographicMemory(A)"
            )
        check_positive(dimension=dimension)
        self.dimension = dimension

    def __repr__(self) -> str:
        return f"HolographicMemory(dimension={self.dimension})"

    def empty(
        self, *batch: int, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
    ) -> torch.Tensor:
        """The state that holds nothing, `[*batch, 2D]`; a `dtype` of half precision gives float32."""
        return torch.zeros(*batch, 2 * self.dimension, dtype=at_least_float32(dtype), device=device)

    def write(
        self, state: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, strength: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Add pairs.

        Args:
            state: `[..., 2D]`.
            keys: `[..., N, D]`, phases in radians.
            values: `[..., N, 2D]`.
            strength: `[..., N]`, the weight of each pair (default: one); zero leaves a pair out, as for padding, and
                writing a pair again with the negative of its weight erases it.

        Returns:
            The new state `[..., 2D]`.
        """
        self._check(keys=keys, state=state, values=values)
        self._check_pairs(keys, values, strength)
        return write_pairs(*_as_state(state, keys, values, strength))

    def read(self, state: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """What the keys `[..., N, D]` hold: their values `[..., N, 2D]` plus the crosstalk of all other pairs.

        The crosstalk is noise of mean zero, as if a random value had been added for every other pair.
        """
        self._check(keys=keys, state=state)
        return read_pairs(*_as_state(state, keys))

    def decay(self, state: torch.Tensor, rate: float | torch.Tensor) -> torch.Tensor:
        """Forget a little: the weight of everything in the state is multiplied by `rate`.

        Args:
            state: `[..., 2D]`.
            rate: in [0, 1]; a number, or `[...]` with one for each state.
        """
        self._check(state=state)
        if not isinstance(rate, torch.Tensor):
            if not 0 <= rate <= 1:
                raise ValueError(f"rate: {rate} is not in [0, 1]")
            return _as_state(state)[0] * rate
        if rate.device.type == "cpu" and has_values(rate) and not ((rate >= 0) & (rate <= 1)).all():
            raise ValueError(f"rate: {rate.min():.4g} to {rate.max():.4g}; all values are in [0, 1]")
        state, rates = _as_state(state, rate)
        return state * rates[..., None]

    def cleanup(self, vectors: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
        """The nearest code, by cosine similarity: one-shot, each vector by itself.

        Args:
            vectors: `[..., N, 2D]`, such as `read` returns.
            codebook: `[..., K, 2D]`.

        Returns:
            Indices `[..., N]`; of a codebook `[K, 2D]`, `codebook[indices]` are the clean vectors.
        """
        self._check(vectors=vectors, codebook=codebook)
        vectors, codebook = _as_state(vectors, codebook)
        with full_precision(vectors.device):
            return (vectors @ F.normalize(codebook, dim=-1).mT).argmax(-1)

    def recall(
        self,
        state: torch.Tensor,
        keys: torch.Tensor,
        codebook: torch.Tensor,
        strength: torch.Tensor | None = None,
        rounds: int = 12,
    ) -> torch.Tensor:
        """Clean up all pairs together, and cancel their crosstalk: reaches far beyond one-shot.

        Every round guesses all values, subtracts what the guesses contribute to the state, and looks again at what is
        left. A guess is the mean of the codes, weighted by their probabilities, so doubtful pairs are subtracted in
        part; and a term remembers the last round, so that no guess confirms itself (approximate message passing:
        Donoho et al., 2009; of codes, as here: Barbier & Krzakala, 2017). Pairs in the state that are not asked for
        stay as noise. Time and memory grow with rounds · N · K.

        Args:
            state: `[..., 2D]`.
            keys: `[..., N, D]`, phases in radians: all that have been written, for the best result.
            codebook: `[..., K, 2D]`, what a value may be.
            strength: `[..., N]`, the weight that each pair still has in the state (default: one): that of writing,
                times all decay since.
            rounds: of cancellation; 0 is one-shot. Near the capacity it takes more of them.

        Returns:
            The logarithm of the probability of every code, `[..., N, K]`: `argmax(-1)` recalls, `F.nll_loss` trains.
        """
        self._check(keys=keys, state=state, codebook=codebook)
        self._check_pairs(keys, strength=strength)
        _check_rounds(rounds)
        with full_precision(state.device):
            state, keys, codebook, strength = _as_state(state, keys, codebook, strength)
            return cancel_crosstalk(state, keys, codebook, strength, rounds)

    def _check(self, **tensors: torch.Tensor) -> None:
        for name, tensor in tensors.items():
            width = self.dimension if name == "keys" else 2 * self.dimension
            if tensor.shape[-1:] != (width,):
                raise ValueError(
                    f"{name}: the last dimension of its shape {tuple(tensor.shape)} is not {width}, as in {self}; "
                    "keys are phases, all else consists of real and imaginary parts"
                )
            if tensor.is_complex():
                raise ValueError(f"{name}: it is complex; give the real parts of its values, then the imaginary parts")

    def _check_pairs(
        self, keys: torch.Tensor, values: torch.Tensor | None = None, strength: torch.Tensor | None = None
    ) -> None:
        if exporting():  # sizes are not numbers then
            return
        counts = {"keys": keys.shape[-2:-1]}
        if values is not None:
            counts["values"] = values.shape[-2:-1]
        if strength is not None:
            counts["strength"] = strength.shape[-1:]
        if () in counts.values() or len(set(counts.values())) > 1:
            found = " and ".join(str(count[0]) if count else "no" for count in counts.values())
            raise ValueError(f"{', '.join(counts)}: {found} pairs; every pair needs one of each")


def phasors(angles: torch.Tensor) -> torch.Tensor:
    """Unit phasors as real vectors, [cos, sin]: phases `[..., D]` to `[..., 2D]`."""
    return torch.cat([angles.cos(), angles.sin()], -1)


def _check_rounds(rounds: int) -> None:
    if not isinstance(rounds, int) or rounds < 0:
        raise ValueError(f"rounds: {rounds!r} is not an integer of at least 0")


def _as_state(state: torch.Tensor, *others: torch.Tensor | None) -> tuple[Any, ...]:
    """All in the type of the state, or in float32 where that is of half precision; None stays None."""
    dtype = at_least_float32(state.dtype)
    return tuple(x if x is None else x.to(dtype) for x in (state, *others))


def write_pairs(
    state: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, strength: torch.Tensor | None = None
) -> torch.Tensor:
    """Bind values to keys and bundle them into the state: S + Σ_n a_n e^{iθ_n} v_n.

    Args:
        state: `[..., 2D]`.
        keys: θ `[..., N, D]`.
        values: `[..., N, 2D]`.
        strength: a `[..., N]`, or None for ones.
    """
    bound = rotate_pairs(values, keys)  # [..., N, 2D]
    return state + (bound if strength is None else bound * strength[..., None]).sum(-2)


def write_pairs_naive(
    state: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, strength: torch.Tensor | None = None
) -> torch.Tensor:
    """Twin of [`write_pairs`], in complex numbers, one pair at a time."""
    total = torch.complex(*state.chunk(2, -1))
    for n in range(keys.shape[-2]):
        bound = torch.exp(1j * keys[..., n, :]) * torch.complex(*values[..., n, :].chunk(2, -1))
        total = total + (bound if strength is None else bound * strength[..., n, None])
    return torch.cat([total.real, total.imag], -1)


def read_pairs(state: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Unbind: e^{-iθ_n} S, from `[..., 2D]` and θ `[..., N, D]` to `[..., N, 2D]`."""
    return rotate_pairs(state[..., None, :], -keys)


def read_pairs_naive(state: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Twin of [`read_pairs`], in complex numbers, one key at a time."""
    whole = torch.complex(*state.chunk(2, -1))
    read = torch.stack([whole * torch.exp(-1j * keys[..., n, :]) for n in range(keys.shape[-2])], -2)
    return torch.cat([read.real, read.imag], -1)


def cancel_crosstalk(
    state: torch.Tensor,
    keys: torch.Tensor,
    codebook: torch.Tensor,
    strength: torch.Tensor | None,
    rounds: int,
) -> torch.Tensor:
    """The work of [`HolographicMemory.recall`], with its arguments and result.

    What is read for pair n is a_n c + noise of energy τ for each phasor, so the code c has the log-probability
    -|read - a_n c|² / τ up to a constant. τ is measured: it is the energy of what the guesses leave of the state.
    """
    weight = keys.new_ones(keys.shape[:-1]) if strength is None else strength
    weight = weight[..., None]  # [..., N, 1]
    energies = codebook.square().sum(-1)[..., None, :]  # |c|² [..., 1, K]
    written = weight.square().sum((-2, -1)) * energies.mean((-2, -1)) / keys.shape[-1]  # [...]
    floor = (NOISE_FLOOR * written).clamp(min=torch.finfo(state.dtype).tiny)
    guess, left = torch.zeros((), dtype=state.dtype, device=state.device), state
    while True:
        noise = torch.maximum(_phasor_energy(left), floor)  # τ [...]
        read = guess + read_pairs(left, keys)  # [..., N, 2D]
        logits = (2 * weight * (read @ codebook.mT) - weight.square() * energies) / noise[..., None, None]
        if rounds <= 0:
            return logits.log_softmax(-1)
        rounds -= 1
        probability = logits.softmax(-1)  # [..., N, K]
        mean = probability @ codebook  # [..., N, 2D]
        # The variance of a guess is how much it moves with what is read. Every guess has taken a share of that from
        # the state, noise and all; the share is put back, else the next round would take its own echo for a signal.
        doubt = (probability * energies).sum(-1) / keys.shape[-1] - _phasor_energy(mean)  # [..., N]
        echo = (weight[..., 0].square() * doubt).sum(-1) / noise
        guess = weight * mean
        left = write_pairs(state, keys, -guess) + left * echo[..., None]


def cancel_crosstalk_naive(
    state: torch.Tensor,
    keys: torch.Tensor,
    codebook: torch.Tensor,
    strength: torch.Tensor | None,
    rounds: int,
) -> torch.Tensor:
    """Twin of [`cancel_crosstalk`] for one state and one codebook, in complex numbers, pair by pair."""
    whole, turns = torch.complex(*state.chunk(2, -1)), torch.exp(1j * keys)
    codes = torch.complex(*codebook.chunk(2, -1))
    pairs, dimension = keys.shape
    weights = [1.0] * pairs if strength is None else list(strength)
    floor = NOISE_FLOOR * sum(a * a for a in weights) * codes.abs().square().sum(-1).mean() / dimension
    guesses, left = [torch.zeros_like(whole)] * pairs, whole
    for _ in range(rounds + 1):
        noise = torch.maximum(left.abs().square().mean(), floor)
        log_probabilities, means, doubt = [], [], torch.zeros_like(noise)
        for n, a in enumerate(weights):
            read = guesses[n] + left * turns[n].conj()
            distance = torch.stack([(read - a * code).abs().square().sum() for code in codes])
            log_probabilities.append((-distance / noise).log_softmax(-1))
            probability = log_probabilities[-1].exp()
            means.append((probability[:, None] * codes).sum(0))
            spread = (codes - means[-1]).abs().square().mean(-1)  # of each code around the mean
            doubt = doubt + a * a * (probability * spread).sum()
        guesses = [a * mean for a, mean in zip(weights, means, strict=True)]
        left = whole - sum(turn * guess for turn, guess in zip(turns, guesses, strict=True)) + left * doubt / noise
    return torch.stack(log_probabilities)


def _phasor_energy(x: torch.Tensor) -> torch.Tensor:
    """Mean squared magnitude of the phasors, `[..., 2D]` to `[...]`."""
    return 2 * x.square().mean(-1)


def recall_theory(dimension: int, pairs: int, codes: int, rounds: int = 0) -> float:
    """The share of pairs that is recalled in theory: random keys, random unit phasors as codes, weights of one.

    Args:
        dimension: D, in phasors.
        pairs: N in the state.
        codes: K in the codebook.
        rounds: of cancellation, as in [`HolographicMemory.recall`]; 0 is one-shot.

    Returns:
        The probability that the right code has the highest score. Without rounds it is an integral, exact for Gaussian
        crosstalk; with rounds, the prediction for large D (state evolution; sampled with a fixed seed).

    Raises:
        ValueError: `dimension`, `pairs` or `codes` is not a positive integer, or `rounds` a negative one.
    """
    # The score of a code is the mean over D phasors of Re(code* · read). The right code's is 1 plus the crosstalk:
    # each of the N - 1 other pairs adds the mean of D cosines of random angles, of variance 1 / 2D. A wrong code's has
    # mean 0 and hears all N pairs. With crosstalk of energy τ = N - 1, in units of √(1 / 2D):
    #     right ~ N(√(2D), τ),    wrong ~ N(0, τ + 1), and there are K - 1 of them.
    # The right one is the highest if all others are below it:
    #     P = ∫ φ(z) Φ((√(2D) + z √τ) / √(τ + 1))^(K - 1) dz.
    # A round of cancellation leaves the share of each pair's energy that its guess did not explain: 1 - E[p], where p
    # is the probability given to the right code; so τ becomes (N - 1)(1 - E[p]), and the rest is as before.
    check_positive(dimension=dimension, pairs=pairs, codes=codes)
    _check_rounds(rounds)
    z = torch.linspace(-9, 9, 721, dtype=torch.float64)
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    crosstalk = pairs - 1.0
    if rounds:
        generator = torch.Generator().manual_seed(0)
        wrong = torch.randn(128, codes - 1, generator=generator, dtype=torch.float64)
    for _ in range(rounds):
        clarity = 2 * dimension / (crosstalk + 1)  # the right code's log-odds in the mean; all have this variance
        others = (math.sqrt(clarity) * wrong).logsumexp(-1, keepdim=True)  # [samples, 1]
        right = torch.sigmoid(clarity + math.sqrt(clarity) * z - others) @ density  # E[p] over z, for every sample
        crosstalk = (pairs - 1) * max(0.0, 1 - right.mean().item())  # never below zero by rounding
    below = torch.special.log_ndtr((math.sqrt(2 * dimension) + z * math.sqrt(crosstalk)) / math.sqrt(crosstalk + 1))
    return min(1.0, (((codes - 1) * below).exp() @ density).item())  # not above one by rounding


# ---------------------------------------------------------------------------------------------- in a model
class PersistentMemory(nn.Module):
    """A [`HolographicMemory`] that a model fills with what it reads, and asks much later.

    Every token writes one pair, as strongly as its gate says, and asks for one key. What the tokens of a chunk have
    written becomes readable when the chunk is complete, for later chunks only, as in [`ChunkContext`]; the memory fades
    a little with every chunk, so that it stays bounded. What is read is normalised: its size says nothing but how long
    the text is.

    Args:
        dim: channels D of the model.
        dimension: phasors P of the memory.
        chunk_length: tokens of a chunk.
        norm_eps: epsilon of the normalisation.
    """

    def __init__(self, dim: int, dimension: int, chunk_length: int, norm_eps: float = 1e-5) -> None:
        super().__init__()
        self.norm_eps = norm_eps
        self.store = HolographicMemory(dimension)
        self.key_proj = nn.Linear(dim, dimension, bias=False)
        self.value_proj = nn.Linear(dim, 2 * dimension, bias=False)
        self.strength_proj = nn.Linear(dim, 1, bias=False)
        self.query_proj = nn.Linear(dim, dimension, bias=False)
        self.out_proj = nn.Linear(2 * dimension, dim, bias=False)
        self.chunks = ChunkContext(chunk_length, FadingSum(2 * dimension), "memory")

    def reset_parameters(self) -> None:
        """Keys point everywhere, and what is read is quiet: of a new memory it is noise."""
        for projection in (self.key_proj, self.query_proj):
            init_normal_(projection.weight, std=math.pi * projection.in_features**-0.5)
        init_normal_(self.out_proj.weight, std=0.1 * self.out_proj.in_features**-0.5)

    def state_spec(self) -> dict[str, tuple[int, ...]]:
        return self.chunks.state_spec()

    def forward(
        self, x: torch.Tensor, layout: TokenLayout | None = None, cache: RecurrentLayer | None = None
    ) -> torch.Tensor:
        """`[B, T, D]` to `[B, T, D]`; continues from `cache` and updates it, if given."""
        layout = TokenLayout(x.shape[1]) if layout is None else layout
        keys, queries = self.key_proj(x)[:, :, None], self.query_proj(x)[:, :, None]  # [B, T, 1, P]: one each
        values, strength = self.value_proj(x)[:, :, None], self.strength_proj(x).sigmoid()
        with full_precision(x.device):  # the memory keeps its precision
            nothing = self.store.empty(dtype=x.dtype, device=x.device)
            pairs = layout.mask(self.store.write(nothing, keys, values, strength))  # [B, T, 2P]
            held = self.chunks(pairs, layout, cache)
            read = self.store.read(held, queries)[:, :, 0]
            read = F.rms_norm(read, read.shape[-1:], eps=self.norm_eps)
        return self.out_proj(read.to(x.dtype))
