"""Perplexity after layer surgery without any training: the calibrated conversion beside what one would try first.

    python benchmarks/surgery.py MODEL --text wikitext2-valid.txt tinyshakespeare.txt --held_out 0.5 0.1

MODEL is the folder of a causal language model with its tokenizer. All methods keep the same share of the numbers of
all linear layers in the blocks, counted on disk with the bases, and start from the same calibration windows; their
perplexity is measured on the same windows of the held-out part of each text.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from report import RESULTS, print_footer, print_table, write_report
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_holo.conversion import HoloSurgeryConfig, apply_surgery
from hf_holo.conversion.calibration import (
    Factors,
    Site,
    Statistics,
    allocate,
    collect,
    factorise,
    find_sites,
    install,
    stacked_weight,
    surgery_plan,
)
from hf_holo.conversion.convert_arguments import ConvertArguments
from hf_holo.conversion.evaluation import numbers_on_disk, perplexity
from hf_holo.conversion.sources import Source, Text, load_texts, load_tokenizer, mixed
from hf_holo.conversion.surgery import choose

Method = Callable[[PreTrainedModel, float], None]  # converts in place, to this ratio


def factors_of(model: PreTrainedModel, sites: Sequence[Site], statistics: Sequence[Statistics]) -> list[Factors]:
    pairs = zip(tqdm(sites, desc="factors", unit="site"), statistics, strict=True)
    return [factorise(site, stacked_weight(model, site), numbers) for site, numbers in pairs]


def calibrated(model: PreTrainedModel, sites: Sequence[Site], statistics: Sequence[Statistics]) -> Method:
    """`hf-holo convert`: shared and pivoted bases, Fisher weights, ranks chosen together."""
    factors = factors_of(model, sites, statistics)

    def convert(student: PreTrainedModel, ratio: float) -> None:
        ranks = allocate(sites, [f.loss for f in factors], ratio)
        finish(student, sites, factors, ranks, pivoted=True)

    return convert


def per_matrix(model: PreTrainedModel, sites: Sequence[Site], grams: Sequence[torch.Tensor]) -> Method:
    """Two thin factors for each matrix on its own, the same share everywhere."""
    factors = factors_of(model, sites, [Statistics(gram) for gram in grams])

    def convert(student: PreTrainedModel, ratio: float) -> None:
        ranks = [site.largest_rank(ratio, pivoted=False) for site in sites]
        finish(student, sites, factors, ranks, pivoted=False)

    return convert


def grams_per_matrix(
    model: PreTrainedModel, sites: Sequence[Site], statistics: Sequence[Statistics]
) -> list[torch.Tensor]:
    """The second moments of every layer alone, in the order of its sites, from those of the shared sites."""
    single = {site.layers[0]: site for site in find_sites(model, HoloSurgeryConfig())}
    grams = {}
    for site, numbers in zip(sites, statistics, strict=True):
        borders = [0, *accumulate(site.widths)]
        for name, begin, end in zip(site.layers, borders, borders[1:], strict=False):
            if site.projects_outputs:
                grams[name] = numbers.gram[begin:end, begin:end]
            elif single[name].projects_outputs:
                weight = stacked_weight(model, single[name])
                grams[name] = weight @ numbers.gram @ weight.T
            else:
                grams[name] = numbers.gram
    return [grams[name] for name in single]


def gram_without_activations(model: PreTrainedModel, site: Site) -> torch.Tensor:
    """With it the factors are those of the plain SVD: all inputs alike."""
    weight = stacked_weight(model, site)
    return weight @ weight.T if site.projects_outputs else torch.eye(site.inputs)


def random_basis(student: PreTrainedModel, ratio: float) -> None:
    """The nearest weights in a random basis, which costs no storage."""
    apply_surgery(student, HoloSurgeryConfig(ratio=ratio, folded=True))


def finish(
    student: PreTrainedModel,
    sites: Sequence[Site],
    factors: Sequence[Factors],
    ranks: Sequence[int | None],
    pivoted: bool,
) -> None:
    for site, numbers, rank in zip(sites, factors, ranks, strict=True):
        if rank is not None:
            install(student, site, numbers, rank, pivoted)
    student.config.quantization_config = HoloSurgeryConfig(basis="data", layers=surgery_plan(sites, ranks, pivoted))


def kept_on_disk(model: PreTrainedModel, student: PreTrainedModel) -> float:
    """Share of the numbers of all linear layers in the blocks that the files of the student hold."""
    names = choose(model, HoloSurgeryConfig())
    with tempfile.TemporaryDirectory() as folder:
        student.save_pretrained(folder)
        stored = numbers_on_disk(Path(folder), names)
    return stored / sum(p.numel() for name in names for p in model.get_submodule(name).parameters())


def measured(model: PreTrainedModel, texts: Sequence[Text]) -> dict[str, float]:
    return {text.name: perplexity(model, text.held_out, text.name) for text in texts}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--held_out", nargs="+", type=float, default=[0.1], help="share at the end of each text")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.8, 0.9])
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--fisher_tokens", type=int, default=4096)
    parser.add_argument("--eval_windows", type=int, default=12, help="of each text; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)

    start = time.perf_counter()
    options = ConvertArguments(**{k: v for k, v in vars(args).items() if k not in ("model", "ratios", "results")})
    options.check()
    source = Source.find(args.model)
    texts = load_texts(options, load_tokenizer(args.model), source)
    model = source.load()
    windows = mixed(texts)
    fisher_windows = windows[: args.fisher_tokens // args.window]
    sites, single = find_sites(model, HoloSurgeryConfig(shared=True)), find_sites(model, HoloSurgeryConfig())
    statistics = collect(model, sites, windows, fisher_windows, args.seed)
    methods = {
        "calibrated": lambda: calibrated(model, sites, statistics),
        "activation-aware SVD per matrix": lambda: per_matrix(
            model, single, grams_per_matrix(model, sites, statistics)
        ),
        "plain SVD per matrix": lambda: per_matrix(model, single, [gram_without_activations(model, s) for s in single]),
        "random basis": lambda: random_basis,
    }
    teacher = measured(model, texts)
    rows = [{"method": "teacher", "kept": 1.0, **teacher, **{f"{name}, ratio": 1.0 for name in teacher}}]
    for name, make in methods.items():
        convert = make()
        for ratio in args.ratios:
            student = copy.deepcopy(model)
            convert(student, ratio)
            scores = measured(student, texts)
            ratios = {f"{text}, ratio": scores[text] / teacher[text] for text in scores}
            rows.append({"method": name, "kept": kept_on_disk(model, student), **scores, **ratios})
            print_table(rows[-1:])
            seconds = time.perf_counter() - start
            report = figures(model, texts, options, rows)  # after every row: the whole takes long
            path = write_report("surgery", report, seed=args.seed, seconds=seconds, folder=args.results)
    print_table(rows)
    print_footer(path, seconds)


def figures(model: PreTrainedModel, texts: Sequence[Text], options: ConvertArguments, rows: list[dict]) -> dict:
    """What goes into the result file."""
    return {
        "model": model.config.model_type,
        "parameters": model.num_parameters(),
        "window": options.window,
        "calibration_tokens": options.tokens,
        "fisher_tokens": options.fisher_tokens,
        "held_out_windows": {text.name: len(text.held_out) for text in texts},
        "rows": rows,
    }


if __name__ == "__main__":
    main()
