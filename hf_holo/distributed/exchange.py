"""Messages between the processes that share a text, and their gradients, which go the other way.

A process that waits has no part in another one's wait for it: forwards each waits for the one before it only, backwards
for the one after it only. So no order of the messages can block, and a message is found by its tag. Backends without
tags (NCCL) take messages in the order in which they were sent, which is the same on both sides: that of the layers, and
backwards its reverse.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import BackwardCFunction, FunctionCtx, once_differentiable

Message = tuple[tuple[int, ...], torch.dtype]  # shape and dtype: both sides know them, so that only values are sent


class Channel:
    """What one process exchanges with its neighbours.

    Args:
        group: the processes that share a text, in the order of its parts.

    Attributes:
        index, size: the number of this process in the group, and of processes.
        sent_bytes: of all messages so far.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.index, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.sent_bytes = 0
        self._sending: list[tuple[dist.Work, torch.Tensor]] = []

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.size - 1

    def send(self, values: torch.Tensor, to: int, tag: int) -> None:
        """Send a copy of the values to the process number `to`, and go on before it has arrived."""
        values = values.detach().clone(memory_format=torch.contiguous_format)
        work = dist.isend(values, dist.get_global_rank(self.group, to), self.group, tag)
        self._sending.append((work, values))  # type: ignore[arg-type]  # None only outside of the group
        self.sent_bytes += values.nbytes

    def receive(self, into: torch.Tensor, source: int, tag: int) -> torch.Tensor:
        """`into`, filled with what the process number `source` has sent; waits for it."""
        dist.recv(into, dist.get_global_rank(self.group, source), self.group, tag)
        return into

    def flush(self) -> None:
        """Wait until all that was sent has been received: what is forgotten before gets lost."""
        while self._sending:
            self._sending.pop(0)[0].wait()


def receive_state(root: torch.Tensor, channel: Channel, tag: int, message: Message) -> torch.Tensor:
    """A state of the process before this one; its gradient goes back there.

    Args:
        root: a scalar that requires gradients, on the device of the state.
        channel: to the other processes.
        tag: of the state, an even number; its gradient has the next one.
        message: shape and dtype.
    """
    return _Receive.apply(root, channel, tag, message)


def send_state(root: torch.Tensor, channel: Channel, tag: int, state: torch.Tensor) -> torch.Tensor:
    """Hand a state to the process after this one.

    Returns:
        A zero. In the backward pass of what it is added to, the gradient of the state arrives.
    """
    return _Send.apply(root, state, channel, tag)


def join(loss: torch.Tensor, exchanged: list[torch.Tensor]) -> torch.Tensor:
    """The loss. Its backward pass goes through all that was exchanged, whether the loss depends on it or not, for on
    the other side someone waits for the gradient."""
    return _Join.apply(loss, *exchanged)


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, root: torch.Tensor, channel: Channel, tag: int, message: Message) -> torch.Tensor:
        ctx.channel, ctx.tag = channel, tag  # type: ignore[attr-defined]
        shape, dtype = message
        return channel.receive(torch.empty(shape, dtype=dtype, device=root.device), channel.index - 1, tag)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, ...]:
        ctx.channel.send(grad, ctx.channel.index - 1, ctx.tag + 1)
        return None, None, None, None


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, root: torch.Tensor, state: torch.Tensor, channel: Channel, tag: int) -> torch.Tensor:
        ctx.channel, ctx.tag, ctx.message = channel, tag, (state.shape, state.dtype)  # type: ignore[attr-defined]
        channel.send(state, channel.index + 1, tag)
        return torch.zeros_like(root)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        shape, dtype = ctx.message
        wanted = torch.empty(shape, dtype=dtype, device=grad.device)
        return None, ctx.channel.receive(wanted, ctx.channel.index + 1, ctx.tag + 1), None, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, loss: torch.Tensor, *exchanged: torch.Tensor) -> torch.Tensor:
        ctx.messages = [(x.shape, x.dtype, x.device) for x in exchanged]  # type: ignore[attr-defined]
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: BackwardCFunction, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        messages: Any = ctx.messages  # type: ignore[attr-defined]
        return grad, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in messages)
