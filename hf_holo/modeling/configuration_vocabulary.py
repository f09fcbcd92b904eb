"""How a vocabulary is laid out in tables: a strategy chosen by size, and the sizes of what it stores."""

import math
from collections.abc import Mapping
from typing import Any

from .validation import check_choice, check_positive

# The largest vocabulary for which each strategy is the default. Token ids end at 2^31 whatever the strategy.
LARGEST = {"standard": 50_000, "frequency_compressed": 200_000, "adaptive": 500_000, "hash": 2**31}
STRATEGIES = tuple(LARGEST)


def lay_out_vocabulary(
    vocab_size: int, strategy: str | None = None, options: Mapping[str, Any] | None = None
) -> tuple[str, dict[str, Any]]:
    """Choose a strategy if none is named, and say the size of every table.

    The answer is stored in the config, so that a vocabulary which grows later keeps the tables of its old tokens.

    Args:
        vocab_size: number of tokens V, at most 2^31.
        strategy: one of `STRATEGIES`; default: by size, "standard" up to 50,000 tokens, "frequency_compressed" up to
            200,000, "adaptive" up to 500,000, then "hash".
        options: sizes that differ from the defaults.
            frequency_compressed: `frequent_tokens` F, how many of the lowest ids have rows of their own (V / 8);
            `groups` G and `group_size` S: the next G · S tokens are addressed by two factors (both about √(V - F)).
            adaptive: `cutoffs`, the ids at which one cluster ends and a narrower one begins (V / 16, V / 4, V);
            `shrink`, how many times narrower (4).
            hash: `hashes` K, the number of hash functions (3); `buckets`, the rows of each (V / 32 in all);
            `importances`, the rows of the table of importances (V, at most 2^20).

    Returns:
        The strategy and all its options.

    Raises:
        ValueError: an unknown strategy or option, options that are not a dict, or tables that do not fit the
            vocabulary.
    """
    check_positive(vocab_size=vocab_size)
    if strategy is None:
        strategy = next(name for name in STRATEGIES if vocab_size <= LARGEST[name])
    check_choice("embedding_strategy", strategy, STRATEGIES)
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(f"embedding_options: {options!r} is not a dict of sizes by name, or None")
    options = dict(options or {})
    known = _LAYOUTS[strategy](vocab_size, options)
    for name in options.keys() - known.keys():
        choices = ", ".join(map(repr, known)) or "none"
        raise ValueError(f"embedding_options: {name!r} is not an option of {strategy!r}, which takes {choices}")
    return strategy, known


def _standard(vocab_size: int, options: dict[str, Any]) -> dict[str, Any]:
    return {}


def _frequency_compressed(vocab_size: int, options: dict[str, Any]) -> dict[str, Any]:
    frequent = options.get("frequent_tokens", max(1, vocab_size // 8))
    check_positive(frequent_tokens=frequent)
    tail = vocab_size - frequent
    if tail < 2:
        raise ValueError(
            f"frequent_tokens: {frequent} leaves {max(tail, 0)} of vocab_size={vocab_size} tokens to compress; "
            "give fewer, or embedding_strategy='standard'"
        )
    size = options.get("group_size", math.isqrt(tail))
    check_positive(group_size=size)
    groups = options.get("groups", tail // size)
    check_positive(groups=groups)
    if frequent + groups * size > vocab_size:
        raise ValueError(
            f"frequent_tokens: {frequent} and groups={groups} of group_size={size} are {frequent + groups * size} "
            f"tokens, more than vocab_size={vocab_size}"
        )
    if "frequent_tokens" not in options and "groups" not in options:
        frequent = vocab_size - groups * size  # what the groups leave over
    return {"frequent_tokens": frequent, "groups": groups, "group_size": size}


def _adaptive(vocab_size: int, options: dict[str, Any]) -> dict[str, Any]:
    cutoffs = options.get("cutoffs", (vocab_size // 16, vocab_size // 4, vocab_size))
    if not isinstance(cutoffs, (list, tuple)):
        raise ValueError(f"cutoffs: {cutoffs!r} is not a list of at least two ids")
    cutoffs = list(cutoffs)
    shrink = options.get("shrink", 4)
    check_positive(shrink=shrink)
    rising = all(isinstance(end, int) and start < end for start, end in zip([0, *cutoffs], cutoffs, strict=False))
    if len(cutoffs) < 2 or not rising or cutoffs[-1] > vocab_size:
        raise ValueError(
            f"cutoffs: {cutoffs} are not at least two rising ids from 1 to vocab_size={vocab_size}; "
            "a vocabulary below 16 tokens has no default"
        )
    return {"cutoffs": cutoffs, "shrink": shrink}


def _hash(vocab_size: int, options: dict[str, Any]) -> dict[str, Any]:
    hashes = options.get("hashes", 3)
    check_positive(hashes=hashes)
    buckets = options.get("buckets", max(1, vocab_size // (32 * hashes)))
    importances = options.get("importances", min(vocab_size, 2**20))
    check_positive(buckets=buckets, importances=importances)
    if buckets * hashes > vocab_size:
        raise ValueError(
            f"buckets: {buckets} for each of hashes={hashes} are more rows than vocab_size={vocab_size} tokens need; "
            "give fewer, or embedding_strategy='standard'"
        )
    return {"hashes": hashes, "buckets": buckets, "importances": importances}


_LAYOUTS = {
    "standard": _standard,
    "frequency_compressed": _frequency_compressed,
    "adaptive": _adaptive,
    "hash": _hash,
}
