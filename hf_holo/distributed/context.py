"""Context parallelism: every process computes one part of a text, from the state that the part before has left.

A recurrent model needs nothing of the past but its states: the parts meet nowhere else. Layer by layer a process takes
the states of the one before it, computes its part, and hands its own states on, so that the processes work in a chain:
each starts a little later than the one before it, in the first layer, and from then on all of them work at the same
time, on parts of the same layer or of neighbouring ones. What is sent has the size of the states, however long the text
is, and nothing is computed twice or in another order: the result is that of one process.

The idea of handing on the states of linear recurrences: Sun et al., 2024 (Linear Attention Sequence Parallelism).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from ..modeling.backbone import RecurrentBackbone
from ..modeling.cache import CACHE_NAME, PADDING, RecurrentCache, RecurrentLayer, given_cache
from ..modeling.heads import RecurrentForCausalLM
from ..modeling.layers import at_least_float32
from ..modeling.losses import IGNORED
from .exchange import Channel, Message, join, receive_state, send_state

# What a model is called with that has one entry for every token, `[B or 1, T, ...]`.
PER_TOKEN = (
    "input_ids",
    "inputs_embeds",
    "attention_mask",
    "position_ids",
    "seq_idx",
    "labels",
    "shift_labels",
)


# ---------------------------------------------------------------------------------------------- one pass of one part
class Pass:
    """One part of a text on its way through the model.

    Args:
        channel: to the processes that have the other parts.
        length: tokens of this part.
        root: see [`receive_state`].
    """

    def __init__(self, channel: Channel, length: int, root: torch.Tensor) -> None:
        self.channel, self.length, self.root = channel, length, root
        self.exchanged: list[torch.Tensor] = []  # what a backward pass has to go through

    def receive(self, tag: int, message: Message) -> torch.Tensor:
        if not (torch.is_grad_enabled() and message[1].is_floating_point):
            into = torch.empty(message[0], dtype=message[1], device=self.root.device)
            return self.channel.receive(into, self.channel.index - 1, tag)
        state = receive_state(self.root, self.channel, tag, message)
        self.exchanged.append(state)
        return state

    def send(self, tag: int, state: torch.Tensor) -> None:
        if torch.is_grad_enabled() and state.dtype.is_floating_point:
            self.exchanged.append(send_state(self.root, self.channel, tag, state))
        else:
            self.channel.send(state, self.channel.index + 1, tag)


class ContextLayer(RecurrentLayer):
    """The states of one layer, which come from the process before and go to the one after.

    Args:
        current: the pass that this is part of.
        messages: shape and dtype of every state that is handed on, by name.
        first_tag: of its messages; they take two each.
    """

    def __init__(self, current: Pass, messages: dict[str, Message], first_tag: int) -> None:
        super().__init__()
        self.current, self.messages = current, messages
        self.tags = {name: first_tag + 2 * number for number, name in enumerate(messages)}
        self.fed = dict.fromkeys(messages, 0)
        self.before: dict[str, torch.Tensor | None] = {}  # what this part continues from

    def get(self, name: str) -> torch.Tensor | None:
        """The state `name`: that of the process before, until there is one of this part; where a block is computed
        again after it is done (gradient checkpointing), what it was computed from."""
        if name not in self.messages:
            return super().get(name)
        if name not in self.before:
            if not self.current.channel.is_first:
                self.states[name] = self.current.receive(self.tags[name], self.messages[name])
            self.before[name] = self.states.get(name)
        return self.before[name] if self._is_done(name) else super().get(name)

    def put(self, name: str, state: torch.Tensor, tokens: int = 1, replay: Any = None) -> None:
        """As in a [`RecurrentLayer`]; after the last token of this part the process after it gets the state.

        Raises:
            ValueError: the state is not what the other process waits for.
        """
        if name not in self.messages:
            return super().put(name, state, tokens, replay)
        if self._is_done(name):
            return None
        super().put(name, state, tokens, replay)
        self.fed[name] += tokens
        if not self._is_done(name) or self.current.channel.is_last:
            return None
        if (tuple(state.shape), state.dtype) != self.messages[name]:
            found = f"the state {name!r} is {tuple(state.shape)} in {state.dtype}"
            raise ValueError("past_key_values: {}, and state_spec says {} in {}".format(found, *self.messages[name]))
        return self.current.send(self.tags[name], state)

    def _is_done(self, name: str) -> bool:
        return self.fed[name] == self.current.length


class ContextCache(RecurrentCache):
    """What the model continues from in one part of a text; made by [`ContextParallel.part`] for one forward pass."""

    layers: list[ContextLayer]  # type: ignore[assignment]
    can_recompute = True

    def __init__(
        self, current: Pass, messages: list[dict[str, Message]], seen: int, past: RecurrentCache | None
    ) -> None:
        first_tags = [0]
        for names in messages:
            first_tags.append(first_tags[-1] + 2 * len(names))
        super().__init__([{}] * len(messages))
        self.current, self.is_joined = current, False
        self.layers = [ContextLayer(current, *each) for each in zip(messages, first_tags[:-1], strict=True)]
        if past is not None and current.channel.is_first:
            for layer, before in zip(self.layers, past.layers, strict=True):
                layer.fill(before.states)
        self.advance(seen)

    @property
    def is_empty(self) -> bool:
        """Whether no token comes before those of this part."""
        return self.current.channel.is_first and not self.layers[0].states

    def joined(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss of this part, whose backward pass hands gradients on: to be taken of every loss, by all processes.

        Args:
            loss: this part's share, a scalar.
        """
        self.is_joined = True
        return join(loss, self.current.exchanged)

    @torch.no_grad()
    def whole(self) -> RecurrentCache:
        """The states after the whole text, which the last process has: an ordinary cache, the same in all of them,
        without gradients."""
        channel, layers = self.current.channel, []
        seen = torch.tensor(self.get_seq_length(), device=self.current.root.device)
        last = dist.get_global_rank(channel.group, channel.size - 1)
        dist.broadcast(seen, last, channel.group)
        for layer in self.layers:
            states = {}
            for name, (shape, dtype) in layer.messages.items():
                state = torch.empty(shape, dtype=dtype, device=seen.device)
                if channel.is_last:
                    state.copy_(layer.states[name])
                dist.broadcast(state, last, channel.group)
                states[name] = state
            layers.append(states)
        channel.flush()
        cache = RecurrentCache(layers)
        cache.advance(int(seen))
        return cache


# ---------------------------------------------------------------------------------------------- all of it
class ContextParallel:
    """A model whose texts are computed by several processes, each a part of every text.

    Every process is given the whole batch, and computes its part of it. Padding, packed documents (`position_ids`,
    `seq_idx`) and lengths that the number of processes does not divide are honoured: outputs, loss and gradients are
    those of one process.

    Args:
        model: a causal model of the families `hsn` (without attention layers) or `resonance`, the same in all
            processes.
        size: processes that share a text, neighbours in rank; default: all. It divides their number; what remains are
            groups for data parallelism: processes of one group are given the same batch, other groups other ones.
        group: the processes that share a text, in place of `size`.

    Attributes:
        size, index: processes that share a text, and which of them this one is.

    Raises:
        ValueError: `size` does not divide the number of processes, or the model cannot be computed so.

    Example:
        ```python
        context = ContextParallel(model)
        loss = context(input_ids=ids, labels=ids).loss  # of the whole batch, in every process
        loss.backward()
        context.sum_gradients()  # now they are those of one process
        cache = context.prefill(input_ids=ids)  # the state after the whole text
        ```
    """

    def __init__(self, model: nn.Module, size: int | None = None, group: dist.ProcessGroup | None = None) -> None:
        self.model, self.bare = model, check_model(model)
        self.channel = Channel(neighbours(size) if group is None else group)
        self.size, self.index = self.channel.size, self.channel.index
        self._latest: ContextCache | None = None

    def bounds(self, length: int) -> tuple[int, int]:
        """The first token of this process's part of a text of `length` tokens, and the first after it. Parts differ by
        one token at most; the first ones are longer."""
        each, more = divmod(length, self.size)
        start = self.index * each + min(self.index, more)
        return start, start + each + (self.index < more)

    def part(
        self,
        past_key_values: RecurrentCache | None = None,
        cache: RecurrentCache | None = None,
        **batch: Any,
    ) -> dict[str, Any]:
        """This process's part of a batch: what to call `forward` with, in all processes of the group.

        Args:
            past_key_values, cache: what the text continues, the same in all processes; two names of one argument.
            batch: arguments of `forward`, for the whole batch. Labels are shifted here, so that the last token of a
                part has the first of the next one for its label, and `num_items_in_batch` is by default the number of
                labels in the whole batch: the losses of the parts add up to that of the batch.

        Raises:
            ValueError: fewer tokens than processes; reentrant gradient checkpointing; `logits_to_keep`.
        """
        batch = {name: value for name, value in batch.items() if value is not None}
        past = given_cache(past_key_values, cache)
        self._check(batch)
        tokens = batch["inputs_embeds"] if "inputs_embeds" in batch else batch["input_ids"]  # [B, T, ...]
        rows, length = tokens.shape[:2]
        if length < self.size:
            raise ValueError(
                f"input_ids: {length} tokens, fewer than the {self.size} processes that are to share them; pad them on "
                "the right, with a mask"
            )
        if "attention_mask" in batch:
            batch["attention_mask"] = batch["attention_mask"][:, -length:]
        if "labels" in batch:
            ignored = batch.get("ignore_index", IGNORED)
            batch.setdefault("shift_labels", F.pad(batch["labels"][:, 1:], (0, 1), value=ignored))
            batch.setdefault("num_items_in_batch", (batch["shift_labels"] != ignored).sum())
        start, stop = self.bounds(length)
        mine = {
            name: value[:, start:stop].contiguous() if name in PER_TOKEN else value for name, value in batch.items()
        }
        seen = start + (past.get_seq_length() if past is not None else 0)
        self._latest = self._new_cache(rows, stop - start, seen, past, "seq_idx" in batch)
        return {**mine, CACHE_NAME: self._latest}

    def _check(self, batch: dict[str, Any]) -> None:
        base: Any = self.bare.base_model
        if base.gradient_checkpointing and self.model.training:
            options = getattr(base.layers[0]._gradient_checkpointing_func, "keywords", {})
            if options.get("use_reentrant", True):
                raise ValueError(
                    "gradient_checkpointing_kwargs: use_reentrant=True loses the gradients of states that come from "
                    "another process; give {'use_reentrant': False}"
                )
        if not isinstance(batch.get("logits_to_keep", 0), int) or batch.get("logits_to_keep"):
            raise ValueError("logits_to_keep: the last tokens are those of one process only; leave it out")

    def _new_cache(
        self, rows: int, length: int, seen: int, past: RecurrentCache | None, with_seq_idx: bool
    ) -> ContextCache:
        self.channel.flush()
        device, dtype = self.bare.device, at_least_float32(self.bare.dtype)
        family: Any = type(self.bare)
        messages: list[dict[str, Message]] = [
            {name: ((rows, *shape), dtype) for name, shape in spec.items()}
            for spec in family.state_spec(self.bare.config)
        ]
        counts: dict[str, Message] = {PADDING: ((rows,), torch.long)}  # kept next to the states of the first layer
        if with_seq_idx:
            counts["seq_idx"] = ((rows, 1), torch.long)
        messages[0] |= counts
        root = torch.zeros((), device=device, requires_grad=True)
        return ContextCache(Pass(self.channel, length, root), messages, seen, past)

    def __call__(self, **batch: Any) -> ModelOutput:
        """The output of the model for this process's part of the batch; arguments and errors as of [`part`].

        Its `loss` is that of the whole batch; its gradients are this part's share, see [`sum_gradients`]. A loss of
        your own goes through `output.past_key_values.joined` before its backward pass.
        """
        mine = self.part(**batch)
        with self.own_randomness():
            output = self.model(**mine)
        if output.get("loss") is not None:
            output.loss = self.summed(mine[CACHE_NAME].joined(output.loss))
        if not torch.is_grad_enabled():
            self.channel.flush()
        return output

    def summed(self, share: torch.Tensor) -> torch.Tensor:
        """The sum over the parts, with the gradient of this part's share."""
        total = share.detach().clone()
        dist.all_reduce(total, group=self.channel.group)
        return share + (total - share.detach())

    @contextlib.contextmanager
    def own_randomness(self) -> Iterator[None]:
        """Within, every part draws numbers of its own for dropout; outside, all processes draw the same as before."""
        if not (self.model.training and any(isinstance(m, nn.Dropout) and m.p for m in self.model.modules())):
            yield
            return
        seed = int(torch.randint(2**62, ()))
        devices = [self.bare.device] if self.bare.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed + self.index)
            yield

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Replace the gradients of all parameters by their sums over the parts: those of one process. Where there are
        several groups, the mean over these is left to you, as is usual for data parallelism.

        Raises:
            RuntimeError: the loss of the latest part was not joined, so that gradients are missing.
        """
        self.channel.flush()
        if self._latest is not None and not self._latest.is_joined:
            raise RuntimeError("joined: take the backward pass of past_key_values.joined(loss), not of the loss itself")
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        known = torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.int32)
        known = known.to(self.bare.device)
        dist.all_reduce(known, dist.ReduceOp.MAX, self.channel.group)
        for parameter, is_known in zip(trained, known.tolist(), strict=True):
            if is_known:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad, group=self.channel.group)

    @torch.no_grad()
    def prefill(self, **batch: Any) -> RecurrentCache:
        """The state after the whole text, the same in all processes; arguments and errors as of [`part`], labels have
        no meaning here. `model.generate` continues from it: read all tokens but the last, then give it all of them."""
        mine = self.part(**batch)
        self.bare.base_model(**mine, use_cache=True)
        return mine[CACHE_NAME].whole()


def neighbours(size: int | None) -> dist.ProcessGroup:
    """The group of `size` neighbours in rank that this process is in; None: of all processes. All of them call it.

    Raises:
        ValueError: there are no processes, or `size` does not divide their number.
    """
    if not dist.is_initialized():
        raise ValueError(
            "context_parallel_size: there is one process; start several by torchrun or accelerate launch, and "
            "torch.distributed in them"
        )
    processes = dist.get_world_size()
    size = processes if size is None else size
    if size < 1 or processes % size:
        raise ValueError(
            f"context_parallel_size: {size} does not divide the number of processes, {processes}; every text takes as "
            "many of them"
        )
    return dist.new_subgroups(size)[0]


def check_model(model: nn.Module) -> PreTrainedModel:
    """The model of transformers, without what PEFT has put around it.

    Raises:
        ValueError: its texts cannot be computed in parts.
    """
    bare: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    name, accepted = type(bare).__name__, "causal language models of hsn (without attention layers) and resonance do"
    if not isinstance(getattr(bare, "base_model", None), RecurrentBackbone):
        raise ValueError(
            f"model: {name} has no state of constant size to hand from one process to the next; {accepted}"
        )
    if not bare.config.is_causal:
        raise ValueError(f"model: {name} reads in both directions, and states are handed on in one; {accepted}")
    if not isinstance(bare, (RecurrentBackbone, RecurrentForCausalLM)):
        raise ValueError(f"model: {name} judges a text as a whole, and every process has a part of it; {accepted}")
    if "constant_state" not in type(bare).capabilities_of(bare.config):
        raise ValueError(
            f"mixer_types: {name} has attention layers, whose keys grow with the text and are not handed on; {accepted}"
        )
    return bare
