"""Context parallelism: one text over several processes, each of which computes a part and hands its states on."""

from .context import ContextCache, ContextParallel

__all__ = ["ContextCache", "ContextParallel"]
