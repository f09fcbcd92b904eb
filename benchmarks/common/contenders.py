"""Small models that learn generated tasks side by side, named by what they are: `hsn, write=cancel`.

A name is a family and options of its config, `FAMILY, OPTION=VALUE, ...`, with values as YAML has them
(`hsn, mixer_types=[holographic,window]`), or one of the two Llamas. Any such name can be given to `--models`.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import torch
import yaml
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_holo import SpectralGate
from hf_holo.registry import get_architecture

from .report import earlier_rows, machine, read_report, write_report

FILTERED = "llama with filter"  # attention as it solves recall in the literature: after a short causal filter
SOLVED = 0.99  # share of the answers from which on a model has learned a task of recall
MOST_RATES = 6  # learning rates that are tried, those of the command line included


def small_llama(vocab_size: int, width: int, depth: int, intermediate_size: int) -> LlamaForCausalLM:
    """A Llama with heads of 32 channels and a tied head."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=max(1, width // 32),
        intermediate_size=intermediate_size,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def add_filter(llama: LlamaForCausalLM, taps: int = 4, delayed: float = 0.5) -> None:
    """Filter what the attention of every layer reads, as the mixers of HoloSpectralNet do."""
    for layer in llama.model.layers:
        gate = SpectralGate(llama.config.hidden_size, taps, delayed=delayed)
        layer.input_layernorm = nn.Sequential(layer.input_layernorm, gate)


def options_of(name: str) -> tuple[str, dict]:
    """The family and the options that a name says."""
    family, *pairs = name.split(", ")
    for pair in pairs:
        if "=" not in pair:
            raise ValueError(f"models: {name!r} is not of the form 'FAMILY, OPTION=VALUE, ...'")
    return family, {key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in pairs)}


def contender(name: str, vocab_size: int, width: int, depth: int, seed: int) -> PreTrainedModel:
    """The model of this name, with weights of this seed."""
    torch.manual_seed(seed)
    if name in ("llama", FILTERED):
        llama = small_llama(vocab_size, width, depth, width * 8 // 3)
        if name == FILTERED:
            add_filter(llama)
        return llama
    family, options = options_of(name)
    architecture = get_architecture(family)
    sizes = {"vocab_size": vocab_size, "hidden_size": width, "num_hidden_layers": depth, "channel_mix": "gated"}
    return architecture.main_model(architecture.config(**{**sizes, **options}))


class Runs:
    """Runs of a benchmark that are kept in its result file and not repeated.

    Args:
        name: of the result.
        settings: of all runs; runs with others are forgotten.
        folder: of the result file.
        seed: that the report names.
    """

    def __init__(self, name: str, settings: Mapping, folder: Path, seed: int) -> None:
        self.name, self.settings, self.folder, self.seed = name, settings, folder, seed
        self.runs, self.seconds = earlier_rows(name, {"settings": settings}, folder, "runs")
        for run in self.runs:  # the file names the processor of the last run, and others may have come before
            run.setdefault("processor", read_report(name, folder)["machine"]["processor"])

    def run(self, key: dict, measure: Callable[[], dict]) -> dict:
        """The run with these values: an earlier one, or what `measure` gives, `seconds` among it."""
        for run in self.runs:
            if key.items() <= run.items():
                return run
        print(", ".join(f"{name} {value}" for name, value in key.items()), flush=True)
        self.runs.append(key | measure() | {"processor": machine()["processor"]})
        self.seconds += self.runs[-1]["seconds"]
        figures = {"settings": self.settings, "runs": self.runs}
        write_report(self.name, figures, seed=self.seed, seconds=self.seconds, folder=self.folder)
        return self.runs[-1]

    def search(
        self, key: dict, rates: Sequence[float], seeds: Sequence[int], measure: Callable[[float, int], dict]
    ) -> None:
        """Runs with these values, for all seeds, at the learning rates of [`search`].

        Args:
            key: what the runs have in common.
            rates: learning rates to start from.
            seeds: of each rate; the mean of their `chosen_by` is its score.
            measure: gives a run for a rate and a seed.
        """

        def score(rate: float) -> float:
            keys = [{**key, "learning_rate": rate, "seed": seed} for seed in seeds]
            return fmean(self.run(one, lambda one=one: measure(rate, one["seed"]))["chosen_by"] for one in keys)

        search(rates, score)


def search(rates: Sequence[float], score: Callable[[float], float]) -> None:
    """Score learning rates, and then others beyond the edge for as long as the best is there, up to `MOST_RATES`.

    Where the best is as good as can be, nothing is looked for.
    """
    scores = {rate: score(rate) for rate in rates}
    while len(scores) < MOST_RATES and len(rates) > 1:
        best = max(scores, key=lambda rate: scores[rate])
        if min(scores) < best < max(scores) or scores[best] > 0.999:
            return
        beyond = best / 2 if best == min(scores) else best * 2
        scores[beyond] = score(beyond)


def accuracies_of(row: Mapping) -> dict[str, str]:
    """Of a row of [`at_best_rate`] whose runs have `accuracies` by length: lowest and highest, in words."""
    return {n: range_of([run["accuracies"][n] for run in row["runs"]]) for n in row["runs"][0]["accuracies"]}


def mean_accuracies(row: Mapping, name: str) -> list[dict]:
    """The same as points of a picture: means over the seeds, for a model of this name."""
    return [
        {"model": name, "length": int(n), "accuracy": fmean(run["accuracies"][n] for run in row["runs"])}
        for n in row["runs"][0]["accuracies"]
    ]


def at_best_rate(runs: Sequence[dict], names: Sequence[str]) -> list[dict]:
    """Of runs that agree in `names` those at the learning rate whose `chosen_by`, over all seeds, is highest: a row
    with `names`, `learning_rate`, `at_edge` (whether no rate beyond it was tried), and `runs`."""
    rows = []
    for key in dict.fromkeys(tuple(run[name] for name in names) for run in runs):
        own = [run for run in runs if tuple(run[name] for name in names) == key]
        by_rate = {rate: [run for run in own if run["learning_rate"] == rate] for rate in _rates(own)}
        scores = {rate: fmean(run["chosen_by"] for run in some) for rate, some in by_rate.items()}
        best = max(scores, key=lambda rate: scores[rate])
        edge = best in (min(scores), max(scores)) and scores[best] <= 0.999
        values = dict(zip(names, key, strict=True))
        rows.append({**values, "learning_rate": best, "at_edge": edge, "runs": by_rate[best]})
    return rows


def _rates(runs: Sequence[dict]) -> list[float]:
    return sorted({run["learning_rate"] for run in runs})


def edge_note(rows: Sequence[dict]) -> str:
    """Says where the best learning rate is at the edge of those tried: such a model may do better."""
    names = dict.fromkeys(row["model"] for row in rows if row["at_edge"])
    return f"; the best learning rate is the edge of those tried for {', '.join(names)}" if names else ""


def range_of(values: Sequence[float]) -> str:
    """A share, or the lowest and the highest of several seeds."""
    low, high = min(values), max(values)
    return f"{high:.1%}" if round(low, 3) == round(high, 3) else f"{low:.1%} to {high:.1%}"
