"""Several senses at once: what does binding give, beside superposition, concatenation and averaging?

    python benchmarks/multimodal.py MNIST FSDD --task digit

Three tasks, made of handwritten and spoken digits; no picture, recording or sentence of the test is in the training.

digit      which digit it is, from a picture under noise, a sound at 0 dB and a sentence such as "the number is even".
           Every subset of the senses is scored, with one model that was trained with senses taken away at random, and
           with models that never had more than this subset.
sum        the last digit of the sum of the digit that is seen and the one that is heard, both clean.
new_pairs  the same, but a fifth of the hundred pairs of digits never comes in training; what is scored is those pairs.

All models have the same encoders and within 5 % as many parameters, see the same examples in the same order, and are
shown at the best of the same learning rates and weight decays. The choice is made on examples of pictures and
recordings that were kept back from the training; for `new_pairs`, on those of pairs that come in training. Late fusion
is the concatenation, with the same two layers on top as all others; averaging takes the mean of unit vectors, as one
does with the embeddings of CLIP.
A finished run is kept in the result file and not repeated, so that runs can be made one at a time.
"""

import argparse
import math
import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common.fitting import KEPT_BACK, OPTIMIZERS, make_optimizer
from common.report import RESULTS, best_runs, earlier_rows, markdown_table, measured_on, print_footer, write_report
from transformers import PreTrainedModel

from hf_holo import preset_config
from hf_holo.data.labelled import split
from hf_holo.data.senses import SENSES, Digits, load_digits
from hf_holo.data.tokenizers import make_tokenizer
from hf_holo.modeling.fusion import Fusion
from hf_holo.modeling.modeling_resonance_multimodal import (
    ResonanceMultimodalForSequenceClassification,
    unbinding_fidelity,
)

NAME = "multimodal"
PRESET = "resonance-multimodal-tiny"
FUSIONS = ("binding", "superposition", "concatenation", "averaging")
TASKS = {"digit": SENSES, "sum": ("vision", "audio"), "new_pairs": ("vision", "audio")}  # and the senses of each
SUBSETS = [subset for size in (1, 2, 3) for subset in combinations(SENSES, size)]
LONGEST = 0.75  # seconds of a recording; what is longer is cut
HELD_OUT = 2  # of the ten digits that are heard, with each that is seen
IDENTIFIED_AMONG = 1000  # examples, for the fidelity of unbinding


class Averaging(Fusion):
    """The mean of unit vectors, as of the embeddings of CLIP, in the place of a model's fusion."""

    def features(self, name: str, pooled: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        projected = self.projections[name](self.centres[name](pooled, present))
        return F.normalize(projected, dim=-1) * present[:, None]

    def forward(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        vectors = torch.stack([*features.values()])  # [M, B, D]
        return vectors.sum(0) / vectors.any(-1).sum(0)[:, None].clamp_min(1)


class Examples:
    """All examples of a task as tensors, made once: noise and all are functions of the row."""

    def __init__(self, digits: Digits, tokenizer) -> None:
        rows = [digits[row] for row in range(len(digits))]
        self.labels = torch.tensor([row["labels"] for row in rows])
        self.pairs = torch.tensor(np.stack([digits.seen, digits.heard], 1))  # [N, 2]
        pictures = torch.tensor(np.stack([np.asarray(row["image"].convert("L")) for row in rows]))
        self.pixel_values = pictures[:, None].float() / 127.5 - 1  # [N, 1, H, W]
        sounds = [torch.tensor(row["audio"][: round(LONGEST * digits.sounds.sampling_rate)]) for row in rows]
        self.lengths = torch.tensor([len(sound) for sound in sounds])
        self.input_values = torch.nn.utils.rnn.pad_sequence(sounds, batch_first=True).float()  # [N, S]
        self.text = None
        if digits.question == "digit":
            self.text = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")

    def batch(self, rows: torch.Tensor, senses: Sequence[str]) -> dict[str, torch.Tensor]:
        """What a model is given of these senses."""
        inputs = {}
        if "text" in senses and self.text is not None:
            longest = self.text["attention_mask"][rows].sum(1).max()
            inputs = {name: self.text[name][rows, :longest] for name in ("input_ids", "attention_mask")}
        if "vision" in senses:
            inputs["pixel_values"] = self.pixel_values[rows]
        if "audio" in senses:
            lengths = self.lengths[rows]
            longest = int(lengths.max())
            inputs["input_values"] = self.input_values[rows, :longest]
            inputs["audio_attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
        return inputs


def parts_of(digits: Digits, size: int) -> tuple[Digits, Digits]:
    """As many examples to learn from, and `size` to choose by; the two share no picture and no recording."""
    pictures, sounds = split(digits.pictures, KEPT_BACK), split(digits.sounds, KEPT_BACK)
    options = digits.question, digits.seed
    train = Digits(pictures.train, sounds.train, digits.sentences, len(digits), *options)
    return train, Digits(pictures.validation, sounds.validation, digits.sentences, size, *options)


def held_out_pairs() -> torch.Tensor:
    """Which pairs of a seen and a heard digit are kept from the training, `[10, 10]`; every digit is among them."""
    random = np.random.default_rng(0)
    held_out = torch.zeros(10, 10, dtype=torch.bool)
    heard = random.permutation(10)
    for shift in range(HELD_OUT):
        held_out[torch.arange(10), torch.tensor(np.roll(heard, shift))] = True
    return held_out


def build(fusion: str, vocab_size: int, modality_dropout: float, seed: int) -> PreTrainedModel:
    """A new model; that of a concatenation is as narrow behind it as makes it the size of the others."""

    def new(kind: str, **overrides) -> PreTrainedModel:
        config = preset_config(PRESET, fusion=kind, modality_dropout=modality_dropout, **overrides)
        config.text_config.vocab_size = vocab_size
        torch.manual_seed(seed)
        return ResonanceMultimodalForSequenceClassification(config)

    if fusion == "averaging":
        model = new("superposition")
        model.model.fusion.__class__ = Averaging
        return model
    if fusion != "concatenation":
        return new(fusion)
    size = new("binding").num_parameters()
    with torch.device("meta"):
        width = min(range(32, 129, 8), key=lambda width: abs(new(fusion, hidden_size=width).num_parameters() - size))
    return new(fusion, hidden_size=width)


def train(model: PreTrainedModel, examples: Examples, rows: torch.Tensor, senses: Sequence[str], how: dict) -> None:
    """On random batches, the same for every model of a seed; the learning rate rises, and falls along a cosine."""
    optimizer = make_optimizer(how["optimizer"], model, how["learning_rate"], how["weight_decay"])
    steps = how["steps"]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / (0.1 * steps)) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    generator = torch.Generator().manual_seed(how["seed"])
    torch.manual_seed(how["seed"])  # which senses are dropped
    model.train()
    order = torch.empty(0, dtype=torch.long)
    for step in range(steps):
        if len(order) < how["rows"]:
            order = rows[torch.randperm(len(rows), generator=generator)]
        chosen, order = order[: how["rows"]], order[how["rows"] :]
        loss = model(**examples.batch(chosen, senses), labels=examples.labels[chosen]).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"  step {step + 1}: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def accuracy(model: PreTrainedModel, examples: Examples, rows: torch.Tensor, senses: Sequence[str]) -> float:
    model.eval()
    right = 0
    for chosen in rows.split(250):
        logits = model(**examples.batch(chosen, senses)).logits
        right += (logits.argmax(-1) == examples.labels[chosen]).sum().item()
    return right / len(rows)


def scores(model: PreTrainedModel, test: Examples, task: str, senses: Sequence[str]) -> dict[str, float]:
    """Shares of the test that are right: by the senses that are given, or of pairs that are new and of others."""
    every = torch.arange(len(test.labels))
    if task == "digit":
        subsets = [subset for subset in SUBSETS if set(subset) <= set(senses)]
        return {"+".join(subset): accuracy(model, test, every, subset) for subset in subsets}
    if task == "sum":
        return {"test": accuracy(model, test, every, senses)}
    new = held_out_pairs()[test.pairs[:, 0], test.pairs[:, 1]]
    return {
        "test": accuracy(model, test, every[new], senses),
        "known pairs": accuracy(model, test, every[~new], senses),
    }


def overall(right: dict[str, float]) -> float:
    """The mean of scores, those of pairs that never come in training left out: by it the best run is chosen."""
    return right["known pairs"] if "known pairs" in right else sum(right.values()) / len(right)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mnist", help="pictures of digits: a folder, a file or a data set on the Hub")
    parser.add_argument("fsdd", help="spoken digits, likewise")
    parser.add_argument("--task", choices=tuple(TASKS), default="digit")
    parser.add_argument("--fusions", nargs="+", choices=FUSIONS, default=FUSIONS)
    parser.add_argument("--learning_rates", nargs="+", type=float, default=(0.001, 0.002, 0.004))
    parser.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="adamw")
    parser.add_argument("--weight_decays", nargs="+", type=float, default=(0.1,))
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--alone", action="store_true", help="digit: train models on each subset of the senses as well")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--modality_dropout", type=float, default=0.3, help="digit: of the models with all senses")
    parser.add_argument("--train_size", type=int, default=12_000)
    parser.add_argument("--test_size", type=int, default=4_000)
    parser.add_argument("--sampling_rate", type=int, default=8_000, help="of the sounds, in hertz")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)

    name = f"{NAME}_{args.task}"
    kept = ("optimizer", "steps", "rows", "modality_dropout", "train_size", "test_size", "sampling_rate")
    settings = {key: getattr(args, key) for key in kept} | {"kept_back": KEPT_BACK}
    runs, seconds = earlier_rows(name, {"settings": settings}, args.results, "runs")
    question = "digit" if args.task == "digit" else "sum"
    sizes = args.sampling_rate, args.train_size, args.test_size
    digits = load_digits(args.mnist, args.fsdd, question, *sizes)
    tokenizer = make_tokenizer("bpe", [sentence.text for sentence in digits.train.sentences], 512)
    training, chosen_by, test = (
        Examples(part, tokenizer) for part in (*parts_of(digits.train, args.test_size), digits.validation)
    )
    rows = torch.arange(len(training.labels))
    if args.task == "new_pairs":
        rows = rows[~held_out_pairs()[training.pairs[:, 0], training.pairs[:, 1]]]

    todo = [(fusion, TASKS[args.task]) for fusion in args.fusions]
    if args.alone and args.task == "digit":
        todo += [("binding", subset) for subset in SUBSETS if subset != SENSES]
    for seed in args.seeds:
        for fusion, senses in todo:
            for rate in args.learning_rates:
                for decay in args.weight_decays:
                    how = {"learning_rate": rate, "weight_decay": decay, "seed": seed}
                    run = {"fusion": fusion, "senses": "+".join(senses)} | how
                    if any(run.items() <= earlier.items() for earlier in runs):
                        continue
                    print(", ".join(f"{key} {value}" for key, value in run.items()), flush=True)
                    start = time.perf_counter()
                    dropout = args.modality_dropout if args.task == "digit" and len(senses) > 1 else 0.0
                    model = build(fusion, len(tokenizer), dropout, seed)
                    train(model, training, rows, senses, how | settings)
                    run |= {"parameters": model.num_parameters(), "right": scores(model, test, args.task, senses)}
                    run["validation"] = overall(scores(model, chosen_by, args.task, senses))
                    if fusion == "binding" and len(senses) > 1:
                        some = test.batch(torch.arange(min(IDENTIFIED_AMONG, len(test.labels))), senses)
                        measured = unbinding_fidelity(model.model, **some)
                        run["fidelity"] = {sense: fidelity._asdict() for sense, fidelity in measured.items()}
                    runs.append(run | {"seconds": round(time.perf_counter() - start, 1)})
                    seconds += runs[-1]["seconds"]
                    print(f"  {run['right']}", flush=True)
                    figures = {"settings": settings, "runs": runs}
                    write_report(name, figures, seed=args.seeds[0], seconds=seconds, folder=args.results)
    print_footer(args.results / f"{name}.json", seconds)


# What it means ------------------------------------------------------------------------------------------------------


def task_of(result: dict) -> str:
    return result["benchmark"].removeprefix(f"{NAME}_")


def best(figures: dict) -> list[dict]:
    """Of every fusion, of every subset that a model was trained on and of every seed the best run, by what was kept
    back."""
    return best_runs(figures["runs"], ("fusion", "senses", "seed"), lambda run: run["validation"])


def spread(values: Sequence[float]) -> str:
    """Their mean, and how far they are apart if there are several."""
    mean = sum(values) / len(values)
    return f"{mean:.1%}" if len(values) < 2 else f"{mean:.1%} ({min(values):.1%} to {max(values):.1%})"


def by_model(figures: dict) -> dict[tuple[str, str], list[dict]]:
    """The best runs of all seeds, by fusion and senses."""
    models: dict[tuple[str, str], list[dict]] = {}
    for run in best(figures):
        models.setdefault((run["fusion"], run["senses"]), []).append(run)
    return models


def sentence(result: dict) -> str:
    models, settings = by_model(result["figures"]), result["figures"]["settings"]
    everything = "+".join(TASKS[task_of(result)])
    shares = []
    for (fusion, senses), runs in models.items():
        if senses == everything:
            key = "test" if "test" in runs[0]["right"] else everything
            shares.append(f"{fusion} {spread([run['right'][key] for run in runs])}")
    asked = {
        "digit": "digits from an obscured picture, a noisy sound and a vague sentence",
        "sum": "last digit of the sum of a written and a spoken digit",
        "new_pairs": "the same of pairs of digits that never came in training",
    }[task_of(result)]
    return f"{asked}, {settings['steps']:,} steps, right: {', '.join(shares)}; {seeds_of(result)}"


def seeds_of(result: dict) -> str:
    count = len({run["seed"] for run in result["figures"]["runs"]})
    return "one seed" if count == 1 else f"{count} seeds"


def table(result: dict) -> str:
    """What each fusion gets right, at its best learning rate and weight decay."""
    figures = result["figures"]
    models, settings = by_model(figures), figures["settings"]
    columns = list(next(iter(models.values()))[0]["right"])
    trained = {senses: runs for (fusion, senses), runs in models.items() if senses != "+".join(TASKS[task_of(result)])}
    rows = []
    for (fusion, senses), runs in models.items():
        if senses in trained:
            continue
        cells = (spread([run["right"][column] for run in runs]) for column in columns)
        rows.append((fusion, f"{runs[0]['parameters']:,}", *cells))
    if trained:
        cells = (
            spread([run["right"][column] for run in trained[column]]) if column in trained else "" for column in columns
        )
        rows.append(("binding, trained on these senses alone", "", *cells))
    grid = [sorted({run[key] for run in figures["runs"]}) for key in ("learning_rate", "weight_decay")]
    fidelity = [run["fidelity"] for run in best(figures) if "fidelity" in run and run["senses"] not in trained]
    lines = [
        markdown_table(("", ">parameters", *(f">{column.replace('+', ' + ')}" for column in columns)), rows),
        "",
        f"Shares of {settings['test_size']:,} examples; {settings['steps']:,} steps of {settings['rows']}, each model "
        f"at the best of the learning rates {grid[0]} and weight decays {grid[1]} ({settings['optimizer']}), "
        f"{seeds_of(result)}. {result['seconds']:,.0f} seconds for all on: {measured_on(result)}.",
    ]
    if fidelity:
        senses = fidelity[0]
        parts = (
            f"{sense} {senses[sense]['cosine']:.2f}, and {senses[sense]['identified']:.1%} identified"
            for sense in senses
        )
        lines += ["", f"Read back from the vector of the binding, cosine with what was bound: {'; '.join(parts)}."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
