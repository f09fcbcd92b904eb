"""Perplexity after layer surgery without any training: the calibrated conversion compared with what one tries first.

    python benchmarks/surgery.py MODEL --text wikitext2-valid.txt tinyshakespeare.txt --held_out 0.5 0.1

MODEL is the folder of a causal language model with its tokenizer. At a ratio all methods keep the same share of the
values of the converted layers, counted on disk with the bases, and start from the same calibration windows; their
perplexity is measured on the same windows of the held-out part of each text. With `--students` the converted models
are kept, to be distilled (`benchmarks/distillation.py`), and those that are there already are used again. Rows that the
result file holds already are not measured again. The seconds are those of what the run itself did.
"""

import argparse
import copy
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common.report import RESULTS, earlier_rows, markdown_table, measured_on, print_footer, print_table, write_report
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_holo.conversion import HoloSurgeryConfig, apply_surgery
from hf_holo.conversion.convert.arguments import ConvertArguments
from hf_holo.conversion.sources import Source, Text, calibration_texts, load_tokenizer, mixed
from hf_holo.conversion.surgery.calibration import (
    Factors,
    Site,
    Statistics,
    allocate,
    collect,
    factorise,
    find_sites,
    install_all,
    stacked_weight,
    surgery_plan,
)
from hf_holo.conversion.surgery.plan import choose
from hf_holo.conversion.surgery.refit import refit
from hf_holo.modeling.checkpoint import values_on_disk

Method = Callable[[PreTrainedModel, float], None]  # converts in place, to this ratio
CALIBRATED, NOT_REFITTED, PER_MATRIX, PLAIN, RANDOM = (
    "calibrated",
    "calibrated, not refitted",
    "activation-aware SVD per matrix",
    "plain SVD per matrix",
    "random basis",
)
SCOPES = {"all": None, "attention": ["attn|attention"]}  # patterns of the linear layers that are converted
SCOPE_NAMES = {"all": "all linear layers", "attention": "those of attention"}


def factors_of(model: PreTrainedModel, sites: Sequence[Site], statistics: Sequence[Statistics]) -> list[Factors]:
    pairs = zip(tqdm(sites, desc="factors", unit="site"), statistics, strict=True)
    return [factorise(site, stacked_weight(model, site), measured) for site, measured in pairs]


def calibrated(
    sites: Sequence[Site], statistics: Sequence[Statistics], factors: Sequence[Factors], windows: torch.Tensor | None
) -> Method:
    """`hf-holo convert`: shared and pivoted bases, Fisher weights, ranks chosen together; refitted to the windows."""

    def convert(student: PreTrainedModel, ratio: float) -> None:
        ranks = allocate(sites, [f.loss for f in factors], ratio)
        if windows is None:
            finish(student, sites, factors, ranks, pivoted=True)
        else:
            refit(student, sites, ranks, [measured.fisher for measured in statistics], windows)
            student.config.quantization_config = surgery_with(sites, ranks, pivoted=True)

    return convert


def per_matrix(model: PreTrainedModel, sites: Sequence[Site], grams: Sequence[torch.Tensor]) -> Method:
    """Two thin factors for each matrix on its own, the same share everywhere."""

    def convert(student: PreTrainedModel, ratio: float) -> None:
        factors = factors_of(model, sites, [Statistics(gram) for gram in grams])
        ranks = [site.largest_rank(ratio, pivoted=False) for site in sites]
        finish(student, sites, factors, ranks, pivoted=False)

    return convert


def grams_per_matrix(
    model: PreTrainedModel, sites: Sequence[Site], statistics: Sequence[Statistics]
) -> list[torch.Tensor]:
    """The second moments of every layer alone, in the order of its sites, from those of the shared sites."""
    single = {site.layers[0]: site for site in find_sites(model, HoloSurgeryConfig())}
    grams = {}
    for site, measured in zip(sites, statistics, strict=True):
        borders = [0, *accumulate(site.widths)]
        for name, begin, end in zip(site.layers, borders, borders[1:], strict=False):
            if site.projects_outputs:
                grams[name] = measured.gram[begin:end, begin:end]
            elif single[name].projects_outputs:
                weight = stacked_weight(model, single[name])
                grams[name] = weight @ measured.gram @ weight.T
            else:
                grams[name] = measured.gram
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
    install_all(student, sites, ranks, factors, pivoted)
    student.config.quantization_config = surgery_with(sites, ranks, pivoted)


def surgery_with(sites: Sequence[Site], ranks: Sequence[int | None], pivoted: bool) -> HoloSurgeryConfig:
    return HoloSurgeryConfig(basis="data", layers=surgery_plan(sites, ranks, pivoted))


class Trial(NamedTuple):
    """A method, the layers that it is used on, and the share of their values that it keeps."""

    method: str
    scope: str  # a key of SCOPES
    ratio: float

    @property
    def folder(self) -> str:
        """Name of the folder of the student."""
        return f"{self.method}-{self.scope}-{self.ratio:.2f}".replace(",", "").replace(" ", "-")


def methods_for(model: PreTrainedModel, texts: Sequence[Text], args: argparse.Namespace) -> dict[tuple, Method]:
    """All methods, by name and scope; all of them share what the calibration measures."""
    windows = mixed(texts)
    sites = find_sites(model, surgery_of("all", shared=True))
    statistics = collect(model, sites, windows, windows[: args.fisher_tokens // args.window], args.seed)
    single = find_sites(model, surgery_of("all"))
    fitted = list(zip(sites, statistics, factors_of(model, sites, statistics), strict=True))
    attention = {name for site in find_sites(model, surgery_of("attention")) for name in site.layers}
    scopes = {"all": fitted, "attention": [entry for entry in fitted if entry[0].layers[0] in attention]}
    unweighted = [gram_without_activations(model, site) for site in single]
    return {
        **{(CALIBRATED, scope): calibrated(*zip(*entries, strict=True), windows) for scope, entries in scopes.items()},
        **{(NOT_REFITTED, scope): calibrated(*zip(*entries, strict=True), None) for scope, entries in scopes.items()},
        (PER_MATRIX, "all"): per_matrix(model, single, grams_per_matrix(model, sites, statistics)),
        (PLAIN, "all"): per_matrix(model, single, unweighted),
        (RANDOM, "all"): random_basis,
    }


def surgery_of(scope: str, **options: Any) -> HoloSurgeryConfig:
    return HoloSurgeryConfig(modules=SCOPES[scope], **options)


def kept_on_disk(model: PreTrainedModel, folder: Path, scope: str) -> float:
    """Share of the values of the linear layers in this scope that the files of the student hold."""
    names = choose(model, surgery_of(scope))
    dense = sum(p.numel() for name in names for p in model.get_submodule(name).parameters())
    return values_on_disk(folder, names) / dense


def measured(model: PreTrainedModel, texts: Sequence[Text]) -> dict[str, float]:
    return {text.name: text.perplexity(model, text.name) for text in texts}


def convert_all(
    missing: Sequence[Trial],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[Text],
    folder: Path,
    args: argparse.Namespace,
) -> None:
    """Save the student of every trial, with its tokenizer, in a folder of its own, but for those that are there."""
    missing = [trial for trial in missing if not (folder / trial.folder / "tokenizer_config.json").exists()]
    methods = methods_for(model, texts, args) if missing else {}
    for trial in missing:
        student = copy.deepcopy(model)
        methods[trial.method, trial.scope](student, trial.ratio)
        student.save_pretrained(folder / trial.folder)
        tokenizer.save_pretrained(folder / trial.folder)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--held_out", nargs="+", type=float, default=[0.1], help="share at the end of each text")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.9, 0.8, 0.7, 0.6], help="of all linear layers")
    parser.add_argument("--attention_ratios", nargs="+", type=float, default=[0.4], help="of those of attention alone")
    parser.add_argument("--baseline_ratios", nargs="+", type=float, default=[0.8], help="of the methods to compare")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--fisher_tokens", type=int, default=16384)
    parser.add_argument("--eval_windows", type=int, default=64, help="of each text, evenly spaced; 0: all")
    parser.add_argument("--students", type=Path, help="folder that keeps the converted models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)

    start = time.perf_counter()
    sizes = {key: getattr(args, key) for key in ("tokens", "fisher_tokens", "eval_windows", "seed")}
    options = ConvertArguments(train_file=args.text, validation_fraction=args.held_out, block_size=args.window, **sizes)
    options.check()
    source, tokenizer = Source.find(args.model), load_tokenizer(args.model)
    texts = calibration_texts(options, tokenizer, source)
    model = source.load()
    settings = settings_of(model, texts, options)
    rows, spent = earlier_rows("surgery", settings, args.results)

    trials = [Trial(CALIBRATED, "all", ratio) for ratio in args.ratios]
    trials += [Trial(m, "attention", ratio) for m in (CALIBRATED, NOT_REFITTED) for ratio in args.attention_ratios]
    others = (NOT_REFITTED, PER_MATRIX, PLAIN, RANDOM)
    trials += [Trial(method, "all", ratio) for method in others for ratio in args.baseline_ratios]
    done = {(row["method"], row["scope"], row["ratio"]) for row in rows}
    missing = [trial for trial in trials if trial not in done]
    with tempfile.TemporaryDirectory() as scratch:
        students = args.students or Path(scratch)
        convert_all(missing, model, tokenizer, texts, students, args)
        if not rows:
            teacher = measured(model, texts)
            rows.append({**Trial("teacher", "all", 1.0)._asdict(), "kept": 1.0, **teacher, **ratios(teacher, teacher)})
        for trial in missing:
            folder = students / trial.folder
            scores = measured(source.auto_class.from_pretrained(folder, dtype=torch.float32), texts)
            kept = kept_on_disk(model, folder, trial.scope)
            rows.append({**trial._asdict(), "kept": kept, **scores, **ratios(scores, rows[0])})
            print_table(rows[-1:])
            seconds = spent + time.perf_counter() - start
            figures = settings | {"rows": rows}  # after every row: the whole takes long
            write_report("surgery", figures, seed=args.seed, seconds=seconds, folder=args.results)
    print_table(rows)
    print_footer(args.results / "surgery.json", spent + time.perf_counter() - start)


def ratios(scores: Mapping[str, float], teacher: Mapping[str, float]) -> dict[str, float]:
    """Perplexities divided by the teacher's."""
    return {f"{text}, ratio": scores[text] / teacher[text] for text in scores}


def settings_of(model: PreTrainedModel, texts: Sequence[Text], options: ConvertArguments) -> dict[str, Any]:
    """What all rows of the result file share."""
    return {
        "model": model.config.model_type,
        "parameters": model.num_parameters(),
        "window": options.block_size,
        "calibration_tokens": options.tokens,
        "fisher_tokens": options.fisher_tokens,
        "held_out": options.validation_fraction,
        "held_out_windows": {text.name: len(text.held_out) for text in texts},
    }


def sentence(result: dict) -> str:
    f = result["figures"]
    texts = list(f["held_out_windows"])
    rows = []
    for row in f["rows"][1:]:  # the first is the teacher itself
        quotients = " / ".join(f"{row[text + ', ratio']:.3g}" for text in texts)
        rows.append(f"{row['method']}, {row['kept']:.0%} of {SCOPE_NAMES[row['scope']]} kept: {quotients}")
    windows = " / ".join(f"{count} windows of {text}" for text, count in f["held_out_windows"].items())
    return (
        f"perplexity after converting linear layers of a {f['model']} with {f['parameters']:,} parameters, "
        f"not trained afterwards, divided by the teacher's, on {windows}: {'; '.join(rows)}; one seed"
    )


def headline(result: dict, distilled: dict) -> str:
    """The calibrated conversion that keeps most of all linear layers and was distilled afterwards."""
    f, rows = result["figures"], [row for row in distilled["figures"]["rows"] if row["scope"] == "all"]
    row = max(rows, key=lambda row: row["kept"])
    texts = [name.split("-")[0].removesuffix(".txt") for name in f["held_out_windows"]]
    after = " / ".join(f"{row[text + ', ratio']:.2f}" for text in f["held_out_windows"])
    before = " / ".join(f"{row[text + ', ratio before']:.2f}" for text in f["held_out_windows"])
    return (
        f"{row['kept']:.0%} of the linear layers of a {f['parameters'] / 1e6:.0f} M {f['model'].title()} kept, "
        f"{row['seconds'] / 60:.0f} minutes of distillation: perplexity {after} times the teacher's on "
        f"{' / '.join(texts)}, {before} without (one seed)"
    )


def table(result: dict, distilled: dict) -> str:
    """Perplexities after surgery and, where `distilled` (of distillation.py) has them, after distillation."""
    f, texts = result["figures"], result["figures"]["held_out_windows"]
    later = {(r["method"], r["scope"], r["ratio"]): r for r in distilled["figures"].get("rows", [])}
    rows = []
    for row in f["rows"][1:]:  # the first is the teacher itself
        after = later.get((row["method"], row["scope"], row["ratio"]))
        cells = [f"{row[f'{text}, ratio']:.4g}" for text in texts]
        cells += [f"{after[f'{text}, ratio']:.4g}" if after else "" for text in texts]
        rows.append((row["method"], SCOPE_NAMES[row["scope"]], f"{row['kept']:.0%}", *cells))
    head = ("method", "layers", ">kept", *(f">{text}" for text in texts), *(f">distilled: {text}" for text in texts))
    windows = ", ".join(f"{count} windows of {text}" for text, count in texts.items())
    lines = [markdown_table(head, rows), ""]
    lines.append(f"Perplexity divided by the teacher's, on {windows} that nothing was fitted to; one seed.")
    if later:
        minutes = max(row["seconds"] for row in later.values()) / 60
        tokens = max(row["tokens"] for row in later.values())
        lines.append(f"Distilled: {minutes:.0f} minutes at most, {tokens:,} tokens, on: {measured_on(distilled)}.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
