"""Generated tasks: what a mixer must keep, count or find, made from a seed, without data files.

A [`Task`] makes batches `(input_ids [B, T], labels [B, T])`. The label of a place is what the logits *at that place*
should say, so that nothing has to be shifted, and -100 where nothing is asked. Accuracy is the share of the asked
places whose most likely token is the label; `chance` is what guessing gives.

| task | what is asked |
|---|---|
| [`Sums`] | the sum modulo n of all tokens so far; n = 2 is parity |
| [`GroupProducts`] | the product of all group elements so far, in S3, A5 or another group of permutations |
| [`QueriedPairs`] | MQAR: values of keys that come again, here and there in a text |
| [`Pairs`] | the values of all keys, after filler |
| [`Repeat`] | a sequence, the second time |
| [`SelectiveCopy`] | in order, the tokens that stood among noise |
| [`Induction`] | what followed a token that came once before |
| [`Needles`], [`Passkey`] | a number that was named somewhere in real prose |

Sources: sums and group products as tests of state tracking (Liu et al., "Transformers learn shortcuts to automata",
2023; Merrill et al., "The illusion of state in state-space models", 2024; Grazzi et al., "Unlocking state-tracking in
linear RNNs through negative eigenvalues", 2025); multi-query associative recall (Arora et al., "Zoology", 2023);
selective copying and induction heads (Gu & Dao, "Mamba", 2023); the pass key (Mohtashami & Jaggi, "Landmark attention",
2023) and the needle in a haystack (Kamradt, 2023).
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..data.windows import encode
from ..modeling.losses import IGNORED

Batch = tuple[torch.Tensor, torch.Tensor]  # input_ids and labels, both [B, T]


class Task(ABC):
    """What is asked of a causal language model.

    Attributes:
        name: of the task and its sizes, for tables.
        asked: what the labels are, in words.
        vocab_size: tokens that a model needs.
        chance: accuracy of guessing.
        shortest: the smallest length.
    """

    asked: str

    @property
    @abstractmethod
    def name(self) -> str: ...

    @property
    @abstractmethod
    def vocab_size(self) -> int: ...

    @property
    @abstractmethod
    def chance(self) -> float: ...

    @property
    def shortest(self) -> int:
        return 1

    def batch(self, rows: int, length: int, generator: torch.Generator) -> Batch:
        """Input ids and labels, both `[rows, length]`; the same for the same state of the generator.

        Raises:
            ValueError: `length` is too small for the task.
        """
        if length < self.shortest:
            raise ValueError(f"length: {length} is too small for {self.name}, which needs at least {self.shortest}")
        return self._batch(rows, length, generator)

    @abstractmethod
    def _batch(self, rows: int, length: int, generator: torch.Generator) -> Batch: ...


def _choices(rows: int, count: int, wanted: int, generator: torch.Generator) -> torch.Tensor:
    """`wanted` different numbers below `count` in random order, in every row: `[rows, wanted]`."""
    return torch.rand(rows, count, generator=generator).argsort(1)[:, :wanted]


def _asked_at_the_end(tokens: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """Labels `[rows, T]` of tokens that ask for `answers` `[rows, n]` at their last n places."""
    labels = torch.full_like(tokens, IGNORED)
    labels[:, -answers.shape[1] :] = answers
    return labels


# ------------------------------------------------------------------------------------------------- keeping a state
@dataclass(frozen=True)
class Sums(Task):
    """Digits below `modulus`, and after each of them the sum so far, modulo `modulus`."""

    modulus: int = 2
    asked = "sums so far"

    @property
    def name(self) -> str:
        return "parity" if self.modulus == 2 else f"sums modulo {self.modulus}"

    @property
    def vocab_size(self) -> int:
        return self.modulus

    @property
    def chance(self) -> float:
        return 1 / self.modulus

    def _batch(self, rows: int, length: int, generator: torch.Generator) -> Batch:
        digits = torch.randint(self.modulus, (rows, length), generator=generator)
        return digits, digits.cumsum(1) % self.modulus


@dataclass(frozen=True)
class GroupProducts(Task):
    """Elements of a group of permutations, and after each of them the product so far, x_1 x_2 ... x_t.

    S3 (6 elements) can be solved with two turns; A5 (60) is the smallest group that cannot be taken apart, and its word
    problem is complete for NC¹.

    Args:
        letter: "S" for all permutations, "A" for the even ones.
        degree: of how many things.
    """

    letter: str = "S"
    degree: int = 3
    asked = "products so far"

    def __post_init__(self) -> None:
        if self.letter not in ("S", "A") or not 2 <= self.degree <= 6:
            raise ValueError(f"letter, degree: {self.letter!r}, {self.degree} are not 'S' or 'A' and 2 to 6")

    @property
    def name(self) -> str:
        return f"{self.letter}{self.degree}"

    @property
    def vocab_size(self) -> int:
        return len(self.table)

    @property
    def chance(self) -> float:
        return 1 / len(self.table)

    @cached_property
    def elements(self) -> list[tuple[int, ...]]:
        """The permutations, as images of 0, 1, 2, ...; the first is the identity."""
        every = itertools.permutations(range(self.degree))
        return [one for one in every if self.letter == "S" or not _is_odd(one)]

    @cached_property
    def table(self) -> torch.Tensor:
        """The number of the product a·b, which applies b first: `[n, n]`."""
        number = {element: i for i, element in enumerate(self.elements)}
        return torch.tensor([[number[tuple(a[i] for i in b)] for b in self.elements] for a in self.elements])

    def _batch(self, rows: int, length: int, generator: torch.Generator) -> Batch:
        tokens = torch.randint(len(self.table), (rows, length), generator=generator)
        products, reach = tokens, 1  # of the last `reach` tokens
        while reach < length:
            joined = self.table[products[:, :-reach], products[:, reach:]]
            products, reach = torch.cat([products[:, :reach], joined], 1), 2 * reach
        return tokens, products


def _is_odd(permutation: tuple[int, ...]) -> bool:
    return sum(a > b for a, b in itertools.combinations(permutation, 2)) % 2 == 1


# --------------------------------------------------------------------------------------------- finding what was read
@dataclass(frozen=True)
class QueriedPairs(Task):
    """MQAR: `pairs` keys, each followed by its value, then a text of random tokens in which every key comes once more,
    at an even distance, more often soon than late; at that place its value is asked.

    Keys are tokens of the lower half of the vocabulary, values of the upper half; in a sequence all differ.

    Args:
        pairs: in a sequence.
        vocabulary: tokens.
        power: the n-th place after the pairs is chosen with a weight of n^(power - 1).
    """

    pairs: int = 16
    vocabulary: int = 512
    power: float = 0.01
    asked = "values of keys"

    def __post_init__(self) -> None:
        if not 0 < self.pairs < self.vocabulary // 2:
            raise ValueError(f"pairs: {self.pairs} is not between 1 and {self.vocabulary // 2 - 1}")

    @property
    def name(self) -> str:
        return f"MQAR, {self.pairs} pairs"

    @property
    def vocab_size(self) -> int:
        return self.vocabulary

    @property
    def chance(self) -> float:
        return 1 / (self.vocabulary - self.vocabulary // 2)

    @property
    def shortest(self) -> int:
        return 4 * self.pairs

    def _batch(self, rows: int, length: int, generator: torch.Generator) -> Batch:
        half, begin = self.vocabulary // 2, 2 * self.pairs
        keys = 1 + _choices(rows, half - 1, self.pairs, generator)  # token 0 is none of them
        values = half + _choices(rows, self.vocabulary - half, self.pairs, generator)
        weights = torch.arange(1.0, (length - begin) // 2 + 1) ** (self.power - 1)
        places = torch.multinomial(weights.expand(rows, -1), self.pairs, generator=generator)
        places = begin + 2 * places  # [rows, pairs], one for every key
        tokens = torch.randint(self.vocabulary, (rows, length), generator=generator)
        tokens[:, :begin] = torch.stack([keys, values], -1).flatten(1)
        labels = torch.full_like(tokens, IGNORED).scatter_(1, places, values)
        return tokens.scatter_(1, places, keys), labels


@dataclass(frozen=True)
class Pairs(Task):
    """`pairs` keys with their values, filler, then every key again in another order, whose value is asked and follows.

    Args:
        pairs: in a sequence; its keys differ.
        symbols: of each of three kinds of tokens: keys, values and filler.
        distinct: whether the values of a sequence differ too.
    """

    pairs: int = 8
    symbols: int = 32
    distinct: bool = False
    asked = "values of keys"

    def __post_init__(self) -> None:
        if not 0 < self.pairs <= self.symbols:
            raise ValueError(f"pairs: {self.pairs} is not between 1 and {self.symbols}, the number of keys")

    @property
    def name(self) -> str:
        return f"{self.pairs} pairs behind filler"

    @property
    def vocab_size(self) -> int:
        return 3 * self.symbols

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    @property
    def shortest(self) -> int:
        return self.length(0)

    def length(self, filler: int) -> int:
        """Of a sequence with so many tokens of filler; the last answer is a label only."""
        return 4 * self.pairs + filler - 1

    def _batch(self, rows: int, length: int, generator: torch.Generator) -> Batch:
        filler, symbols = length - self.length(0), self.symbols
        keys = _choices(rows, symbols, self.pairs, generator)
        if self.distinct:
            values = symbols + _choices(rows, symbols, self.pairs, generator)
        else:
            values = symbols + torch.randint(symbols, keys.shape, generator=generator)
        noise = 2 * symbols + torch.randint(symbols, (rows, filler), generator=generator)
        order = torch.rand(keys.shape, generator=generator).argsort(1)
        answers = values.gather(1, order)
        asked = torch.stack([keys.gather(1, order), answers], -1).flatten(1)  # [rows, 2 pairs]
        tokens = torch.cat([torch.stack([keys, values], -1).flatten(1), noise, asked], 1)[:, :-1]
        labels = torch.full_like(tokens, IGNORED)
        labels[:, -asked.shape[1] + 1 :: 2] = answers
        return tokens, labels


@dataclass(frozen=True)
class Repeat(Task):
    """A sequence of random tokens that comes twice; the second time every next token is asked."""

    symbols: int = 16
    asked = "tokens of a sequence that comes again"

    @property
    def name(self) -> str:
        return "repeat"

    @property
    def vocab_size(self) -> int:
        return self.symbols

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    @property
    def shortest(self) -> int:
        return 3

    def _batch(self, rows: int, length: int, generator: torch.Generator) -> Batch:
        once = torch.randint(self.symbols, (rows, length // 2 + 1), generator=generator)
        again = length - once.shape[1]  # its first token says that it begins
        tokens = torch.cat([once, once[:, :again]], 1)
        return tokens, _asked_at_the_end(tokens, once[:, 1 : again + 1])


@dataclass(frozen=True)
class SelectiveCopy(Task):
    """`count` tokens here and there among noise, then as many marks; at these the tokens are asked, in their order.

    Token 0 is noise, 1 the mark, the others are copied.
    """

    count: int = 16
    symbols: int = 14
    asked = "tokens between noise"

    @property
    def name(self) -> str:
        return f"selective copy of {self.count}"

    @property
    def vocab_size(self) -> int:
        return self.symbols + 2

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    @property
    def shortest(self) -> int:
        return 2 * self.count

    def _batch(self, rows: int, length: int, generator: torch.Generator) -> Batch:
        copied = 2 + torch.randint(self.symbols, (rows, self.count), generator=generator)
        places = _choices(rows, length - self.count, self.count, generator).sort(1).values
        tokens = torch.zeros(rows, length, dtype=torch.long).scatter_(1, places, copied)
        tokens[:, -self.count :] = 1
        return tokens, _asked_at_the_end(tokens, copied)


@dataclass(frozen=True)
class Induction(Task):
    """Random tokens among which a special one, the last of the vocabulary, comes once, and again at the end, where what
    followed it is asked: one place in a sequence."""

    symbols: int = 16
    asked = "tokens that followed the special one"

    @property
    def name(self) -> str:
        return "induction"

    @property
    def vocab_size(self) -> int:
        return self.symbols + 1

    @property
    def chance(self) -> float:
        return 1 / self.symbols

    @property
    def shortest(self) -> int:
        return 3

    def _batch(self, rows: int, length: int, generator: torch.Generator) -> Batch:
        tokens = torch.randint(self.symbols, (rows, length), generator=generator)
        place = torch.randint(length - 2, (rows, 1), generator=generator)
        tokens.scatter_(1, place, self.symbols)
        tokens[:, -1] = self.symbols
        return tokens, _asked_at_the_end(tokens, tokens.gather(1, place + 1))


# ------------------------------------------------------------------------------------------------ finding it in prose
PLACES = [
    *("Bergen", "Cusco", "Dakar", "Hanoi", "Izmir", "Kyoto", "Lagos", "Lima"),
    *("Minsk", "Nairobi", "Oslo", "Quito", "Riga", "Sofia", "Tunis", "Vienna"),
]
DIGITS = 5


class Needles(Task):
    """Sentences that give places a number of five digits, anywhere in real prose, and at the end one of the places,
    whose number is asked.

    Args:
        tokenizer: of the model.
        prose: texts; a long sequence repeats them. `read_documents([file])` reads a file.
        count: of such sentences in a sequence.

    Raises:
        ValueError: there is no prose, or `count` is not between 1 and 16.
    """

    asked = "tokens of the number"
    before, after = "\nThe special number of {} is", ".\n"  # the number stands between them
    question = before

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prose: Sequence[str], count: int = 1) -> None:
        if not 1 <= count <= len(PLACES):
            raise ValueError(f"count: {count} is not between 1 and {len(PLACES)}")
        self.tokenizer, self.count = tokenizer, count
        self._prose = encode(tokenizer, prose)
        if not len(self._prose):
            raise ValueError("prose: the texts are empty")

    @property
    def name(self) -> str:
        return "needle" if self.count == 1 else f"one of {self.count} needles"

    @property
    def vocab_size(self) -> int:
        return len(self.tokenizer)

    @property
    def chance(self) -> float:
        """Of digits that are guessed, which makes more of the share of tokens where a token is several digits."""
        return 10 ** (-DIGITS / len(self._ids(" 12345")))

    @cached_property
    def shortest(self) -> int:
        """Enough for the sentences and the question, whichever places and numbers they have."""
        number = max(len(self._ids(f" {digit * DIGITS}")) for digit in "123456789")
        fact = max(len(self._ids(self.before.format(at))) for at in PLACES) + number + len(self._ids(self.after))
        question = max(len(self._ids(self.question.format(at))) for at in PLACES)
        return self.count * fact + question + number

    def _ids(self, text: str) -> list[int]:
        return encode(self.tokenizer, [text]).tolist()

    def _batch(self, rows: int, length: int, generator: torch.Generator) -> Batch:
        made = [self._row(length, generator) for _ in range(rows)]
        tokens = torch.tensor([ids for ids, _ in made])
        labels = torch.full_like(tokens, IGNORED)
        for row, (_, answer) in zip(labels, made, strict=True):
            row[-len(answer) :] = torch.tensor(answer)
        return tokens, labels

    def _row(self, length: int, generator: torch.Generator) -> tuple[list[int], list[int]]:
        """The tokens of a sequence, and those of its answer, all but the last of which it shows."""
        places = [PLACES[i] for i in _choices(1, len(PLACES), self.count, generator)[0].tolist()]
        least = 10 ** (DIGITS - 1)
        numbers = torch.randint(least, 10 * least, (self.count,), generator=generator).tolist()
        answers = [self._ids(f" {number}") for number in numbers]
        end = self._ids(self.after)
        facts = [self._ids(self.before.format(at)) + ids + end for at, ids in zip(places, answers, strict=True)]
        asked = int(torch.randint(self.count, (), generator=generator))
        tail = self._ids(self.question.format(places[asked])) + answers[asked][:-1]
        room = length - len(tail) - sum(map(len, facts))
        if room < 0:  # numbers of this tokenizer take even more tokens than those that `shortest` tries
            raise ValueError(f"length: {length} is too small for {self.name}, which needs {length - room} tokens here")
        start = int(torch.randint(len(self._prose), (), generator=generator))
        prose = self._prose.take(np.arange(start, start + room), mode="wrap").tolist()
        ids, done = [], 0
        for fact, cut in zip(facts, sorted(torch.randint(room + 1, (self.count,), generator=generator)), strict=True):
            ids += prose[done : int(cut)] + fact
            done = int(cut)
        return ids + prose[done:] + tail, answers[asked]


class Passkey(Needles):
    """A pass key of five digits, named once anywhere in real prose, and asked at the end.

    Args:
        tokenizer: of the model.
        prose: texts; a long sequence repeats them.
    """

    before, after = "\nThe pass key is", ". Remember it.\n"
    question = "\nWhat is the pass key? The pass key is"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prose: Sequence[str]) -> None:
        super().__init__(tokenizer, prose)

    @property
    def name(self) -> str:
        return "pass key"
