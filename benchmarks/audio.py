"""Spoken digits: Resonance against a Wav2Vec2 and an Audio Spectrogram Transformer of the same size, all from scratch.

    python benchmarks/audio.py fsdd

`fsdd` is a folder with the Free Spoken Digit Dataset as `train.parquet` and `test.parquet`, the split of its authors. A
tenth of the former is kept back. Each model is trained on the rest at each learning rate, and shown at the one that is
best on what was kept back; then, at that rate, once for every speaker, with that speaker left out and scored. All see
the same recordings in the same order with the same augmentation for as many epochs, with the same optimizer and
schedule, and have the same number of parameters up to 5 %. Wav2Vec2 hears the waveform, in steps of 20 ms; the
Spectrogram Transformer gets the log-mel frames that Resonance makes inside, cut to the length that it is made for. In
training, Resonance and Wav2Vec2 hide equal shares of the time.
The last lines are about time: a minute of sound at once, and sound as it comes.
A finished run is kept in the result file and not repeated, so that runs can be made one at a time
(`--models ast --learning_rates 0.002 --left_out`, without a speaker).
"""

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from common.fitting import KEPT_BACK, OPTIMIZERS, make_optimizer, rates_tried
from common.report import (
    RESULTS,
    best_runs,
    earlier_rows,
    markdown_table,
    measured_on,
    print_footer,
    print_table,
    read_report,
    write_report,
)
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    PreTrainedModel,
    Wav2Vec2Config,
    Wav2Vec2ForSequenceClassification,
)

from hf_holo.data.audio import AUGMENTATIONS, load_audio
from hf_holo.data.labelled import LabelledCollator, named_augmentations, split
from hf_holo.modeling.cache import RecurrentCache
from hf_holo.modeling.configuration_resonance_audio import ResonanceAudioConfig
from hf_holo.modeling.modeling_resonance_audio import ResonanceAudioForAudioClassification
from hf_holo.modeling.processing_resonance_audio import ResonanceFeatureExtractor
from hf_holo.modeling.spectrogram import log_mel

NAME = "audio"
RATE, DIGITS = 8000, 10
MODELS = {"resonance": "Resonance", "wav2vec2": "Wav2Vec2", "ast": "Spectrogram Transformer"}
SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
OFFICIAL = "official"  # in place of a speaker: the split of the authors
AUGMENT = ("speed", "shift", "gain", "noise")
MASKS = {"mask_time_prob": 0.1, "mask_time_length": 2, "mask_feature_prob": 0.15, "mask_feature_length": 6}
FRAMES, BANDS = 128, 64  # of the Spectrogram Transformer, in steps of 10 ms
NEAR = 0.05  # share by which the numbers of parameters may differ


# ------------------------------------------------------------------------------------------------------- models
def build(name: str, width: int, depth: int, seed: int) -> PreTrainedModel:
    """A model for ten digits; the inner width of those compared brings them closest to the size of Resonance."""
    torch.manual_seed(seed)
    ours = resonance(width, depth)
    if name == "resonance":
        return ours
    make = {"wav2vec2": wav2vec2, "ast": spectrogram_transformer}[name]
    per_unit = 2 * width * depth + depth  # parameters of one more inner unit: in, out and bias
    least = make(width, depth, 1).num_parameters()
    torch.manual_seed(seed)
    model = make(width, depth, max(1, 1 + round((ours.num_parameters() - least) / per_unit)))
    if abs(model.num_parameters() / ours.num_parameters() - 1) > NEAR:
        raise ValueError(f"width {width} allows no {name} within {NEAR:.0%} of {ours.num_parameters()} parameters")
    return model


def resonance(width: int, depth: int) -> ResonanceAudioForAudioClassification:
    config = ResonanceAudioConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_labels=DIGITS,
        sampling_rate=RATE,
        num_mel_bins=40,
        frames_per_step=4,
        **MASKS,
    )
    return ResonanceAudioForAudioClassification(config)


def wav2vec2(width: int, depth: int, intermediate_size: int) -> Wav2Vec2ForSequenceClassification:
    """In the form that is stable from scratch, with one convolution less than at 16 kHz."""
    config = Wav2Vec2Config(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=max(1, width // 16),
        intermediate_size=intermediate_size,
        conv_dim=(width // 2,) * 6,
        conv_stride=(5, 2, 2, 2, 2, 2),
        conv_kernel=(10, 3, 3, 3, 3, 2),
        num_feat_extract_layers=6,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        classifier_proj_size=width,
        mask_time_prob=MASKS["mask_time_prob"],
        mask_time_length=MASKS["mask_time_length"],
        num_labels=DIGITS,
    )
    return Wav2Vec2ForSequenceClassification(config)


def spectrogram_transformer(width: int, depth: int, intermediate_size: int) -> ASTForAudioClassification:
    config = ASTConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=max(1, width // 16),
        intermediate_size=intermediate_size,
        max_length=FRAMES,
        num_mel_bins=BANDS,
        num_labels=DIGITS,
    )
    return ASTForAudioClassification(config)


# --------------------------------------------------------------------------------------------------------- data
def inputs_of(name: str, sounds: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    """What a model is called with."""
    extract = ResonanceFeatureExtractor(RATE, do_normalize=name == "wav2vec2")  # as it is trained with
    batch = extract(list(sounds), sampling_rate=RATE, return_tensors="pt")
    return (
        {"input_values": spectrograms(batch["input_values"], batch["attention_mask"])} if name == "ast" else {**batch}
    )


def spectrograms(samples: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Waveforms `[B, S]` to log-mel frames `[B, 128, 64]`, real ones at mean 0 and deviation ½ as in its extractor."""
    frames = log_mel(torch.nn.functional.pad(samples, (60, 60)), 200, 80, RATE, BANDS, 20.0, RATE / 2)[:, :FRAMES]
    real = (torch.arange(frames.shape[1]) < mask.sum(1, keepdim=True) // 80)[..., None]
    count = real.sum((1, 2), keepdim=True) * BANDS
    frames = (frames - (frames * real).sum((1, 2), keepdim=True) / count) * real
    frames = 0.5 * frames / ((frames.square().sum((1, 2), keepdim=True) / count).sqrt() + 1e-5)
    return torch.nn.functional.pad(frames, (0, 0, 0, FRAMES - frames.shape[1]))


@lru_cache(maxsize=1)
def recordings(folder: Path, held_out: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Decoded examples to learn from, to choose a learning rate by, and to score."""
    by = None if held_out == OFFICIAL else {"speaker": held_out}
    splits = load_audio(str(folder), hold_out=by, sampling_rate=RATE)
    known = split(splits.train, KEPT_BACK)
    parts = known.train, known.validation, splits.validation
    train, chosen_by, test = ([part[i] for i in range(len(part))] for part in parts)
    return train, chosen_by, test


# ----------------------------------------------------------------------------------------------------- training
def train(name: str, model: PreTrainedModel, examples: list[dict[str, Any]], rate: float, settings: Mapping) -> None:
    """Whole epochs in batches of recordings of similar length; warm-up, then a cosine."""
    collate = LabelledCollator(
        lambda sounds: inputs_of(name, sounds), "audio", named_augmentations(AUGMENT, AUGMENTATIONS), settings["seed"]
    )
    optimizer = make_optimizer(settings["optimizer"], model, rate)
    peaks = [group["lr"] for group in optimizer.param_groups]
    random = np.random.default_rng(settings["seed"])
    torch.manual_seed(settings["seed"])
    np.random.seed(settings["seed"])  # Wav2Vec2 draws its masks from it
    model.train()
    for epoch in range(settings["epochs"]):
        total, chosen = 0.0, batches([len(example["audio"]) for example in examples], settings["rows"], random)
        for index, batch in enumerate(chosen):
            loss = model(**collate([examples[i] for i in batch])).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            progress = (epoch + (index + 1) / len(chosen)) / settings["epochs"]
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * min(1.0, 10 * progress, 0.525 + 0.475 * math.cos(math.pi * progress))
            optimizer.step()
            total += loss.item()
        print(f"  epoch {epoch + 1}: loss {total / len(chosen):.3f}", flush=True)


def batches(lengths: Sequence[int], rows: int, random: np.random.Generator) -> list[np.ndarray]:
    """Indices in random batches whose recordings are of similar length: of every eight batches, the shortest together.
    The last ones that fill no batch are left out."""
    order = random.permutation(len(lengths))[: len(lengths) // rows * rows]
    groups = (order[start : start + 8 * rows] for start in range(0, len(order), 8 * rows))
    ordered = (sorted(group, key=lambda index: lengths[index]) for group in groups)
    cut = [np.array(group[start : start + rows]) for group in ordered for start in range(0, len(group), rows)]
    return [cut[index] for index in random.permutation(len(cut))]


@torch.no_grad()
def accuracy(name: str, model: PreTrainedModel, examples: list[dict[str, Any]], rows: int = 100) -> float:
    model.eval()
    right = 0
    for start in range(0, len(examples), rows):
        batch = examples[start : start + rows]
        logits = model(**inputs_of(name, [example["audio"] for example in batch])).logits
        right += (logits.argmax(1) == torch.tensor([example["labels"] for example in batch])).sum().item()
    return right / len(examples)


def one_run(name: str, rate: float, held_out: str, folder: Path, settings: Mapping) -> dict:
    examples, chosen_by, scored = recordings(folder, held_out)
    model = build(name, settings["width"], settings["depth"], settings["seed"])
    start = time.perf_counter()
    train(name, model, examples, rate, settings)
    return {
        "model": name,
        "learning_rate": rate,
        "held_out": held_out,
        "seed": settings["seed"],
        "parameters": model.num_parameters(),
        "validation": accuracy(name, model, chosen_by),
        "accuracy": accuracy(name, model, scored),
        "seconds": round(time.perf_counter() - start, 1),
    }


# --------------------------------------------------------------------------------------------------------- time
@torch.no_grad()
def speed(width: int = 256, depth: int = 6) -> dict[str, float]:
    """Seconds for a minute of 16 kHz sound in one piece, and for a step of 40 ms after a second and after a minute."""
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_labels": 50, "frames_per_step": 4}
    model = ResonanceAudioForAudioClassification(ResonanceAudioConfig(**sizes)).eval()
    minute = 0.1 * torch.randn(1, 60 * 16_000)
    model(minute)
    figures = {"parameters": model.num_parameters(), "minute": _seconds(lambda: model(minute), 3)}
    stream = ResonanceAudioForAudioClassification(ResonanceAudioConfig(causal=True, **sizes)).eval()
    for heard in (1, 60):
        cache = RecurrentCache(stream.config)
        stream(minute[:, : heard * 16_000], past_key_values=cache)
        step = minute[:, :640]
        figures[f"step after {heard} s"] = _seconds(lambda: stream(step, past_key_values=cache), 100)  # noqa: B023
    return figures


def _seconds(task: Any, repeats: int) -> float:
    """The median of several times."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        task()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]


# --------------------------------------------------------------------------------------------------------- report
def best(runs: list[dict]) -> dict[str, dict]:
    """Of every model a run on the official split at the learning rate whose mean over the seeds is highest on what was
    kept back, and the accuracies of all of them."""
    official = [run for run in runs if run["held_out"] == OFFICIAL]

    def of_seeds(run: Mapping, what: str) -> list[float]:
        return [r[what] for r in official if _same(r, run, "model", "learning_rate")]

    chosen = best_runs(official, ("model",), lambda run: mean(of_seeds(run, "validation")))
    return {run["model"]: run | {"accuracies": of_seeds(run, "accuracy")} for run in chosen}


def left_out(runs: list[dict], chosen: Mapping) -> dict[str, float]:
    """Accuracy on every speaker who was left out, at the chosen learning rate, the mean over seeds."""
    matching = [run for run in runs if _same(run, chosen, "model", "learning_rate")]
    scores = {who: [run["accuracy"] for run in matching if run["held_out"] == who] for who in SPEAKERS}
    return {who: mean(values) for who, values in scores.items() if values}


def _same(run: Mapping, other: Mapping, *names: str) -> bool:
    return all(run[name] == other[name] for name in names)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with train.parquet and test.parquet")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=tuple(MODELS))
    parser.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="muon")
    parser.add_argument("--learning_rates", nargs="+", type=float, default=(0.003, 0.006, 0.012))
    parser.add_argument("--left_out", nargs="*", default=SPEAKERS, help="speakers to leave out, one after the other")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=(0,), help="for the official split; left out: the first"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)

    settings = {name: getattr(args, name) for name in ("optimizer", "epochs", "rows", "width", "depth")}
    settings["kept_back"] = KEPT_BACK
    runs, seconds = earlier_rows(NAME, {"settings": settings}, args.results, "runs")
    figures = {"settings": settings, "runs": runs}
    figures["speed"] = read_report(NAME, args.results)["figures"].get("speed") if runs else None

    def make(name: str, rate: float, held_out: str, seed: int) -> None:
        nonlocal seconds
        wanted = {"model": name, "learning_rate": rate, "held_out": held_out, "seed": seed}
        if any(_same(run, wanted, *wanted) for run in runs):
            return
        print(f"{name}, learning rate {rate}, held out: {held_out}, seed {seed}", flush=True)
        runs.append(one_run(name, rate, held_out, args.folder, settings | {"seed": seed}))
        seconds += runs[-1]["seconds"]
        write_report(NAME, figures, seed=args.seeds[0], seconds=seconds, folder=args.results)

    for name in args.models:
        for rate in args.learning_rates:
            for seed in args.seeds:
                make(name, rate, OFFICIAL, seed)
    for held_out in args.left_out:
        for name in args.models:
            make(name, best(runs)[name]["learning_rate"], held_out, args.seeds[0])
    if figures["speed"] is None:
        figures["speed"] = speed()
    path = write_report(NAME, figures, seed=args.seeds[0], seconds=seconds, folder=args.results)
    print_table(runs)
    print_footer(path, seconds)


def sentence(result: dict) -> str:
    figures = result["figures"]
    settings, speeds, chosen = figures["settings"], figures["speed"], best(figures["runs"])
    told = ", ".join(f"{MODELS[name]} {mean(run['accuracies']):.1%}" for name, run in chosen.items())
    strangers = {name: left_out(figures["runs"], run) for name, run in chosen.items()}
    unheard = ", ".join(
        f"{MODELS[name]} {mean(scores.values()):.1%}"
        for name, scores in strangers.items()
        if len(scores) == len(SPEAKERS)
    )
    official = [run for run in figures["runs"] if run["held_out"] == OFFICIAL]
    count = max(len(run["accuracies"]) for run in chosen.values())
    seeds = "one seed" if count == 1 else f"mean of {count} seeds"
    also = f"; of speakers never heard, mean of all {len(SPEAKERS)}: {unheard}" if unheard else ""
    return (
        f"spoken digits recognised after {settings['epochs']} epochs with {OPTIMIZERS[settings['optimizer']]}, models "
        f"of {chosen['resonance']['parameters']:,} parameters ± {NEAR:.0%}, each {rates_tried(official)}, {seeds}: "
        f"{told}{also}. A minute of 16 kHz sound takes a model of {speeds['parameters']:,} parameters "
        f"{speeds['minute']:.2f} s; as it comes, 40 ms take {1e3 * speeds['step after 1 s']:.1f} ms after a second and "
        f"{1e3 * speeds['step after 60 s']:.1f} ms after a minute"
    )


def table(result: dict) -> str:
    """For the page about sound."""
    figures, rows = result["figures"], []
    for name, run in best(figures["runs"]).items():
        scores = left_out(figures["runs"], run)
        known = run["accuracies"]
        spread = f" ± {stdev(known):.1%}" if len(known) > 1 else ""
        everyone = f"{mean(scores.values()):.1%}" if len(scores) == len(SPEAKERS) else "–"
        each = [f"{scores[who]:.1%}" if who in scores else "–" for who in SPEAKERS]
        rows.append(
            [
                MODELS[name],
                f"{run['parameters']:,}",
                f"{mean(known):.1%}{spread}",
                everyone,
                *each,
                run["learning_rate"],
                f"{run['seconds'] / 60:.1f} min",
            ]
        )
    heads = ["", ">parameters", ">official split", ">unheard speakers, mean", *(f">{who}" for who in SPEAKERS)]
    settings = figures["settings"]
    rates = {MODELS[n]: sorted({r["learning_rate"] for r in figures["runs"] if r["model"] == n}) for n in MODELS}
    tried = "; ".join(f"{name} {values}" for name, values in rates.items() if values)
    seeds = max(len(run["accuracies"]) for run in best(figures["runs"]).values())
    return (
        f"{markdown_table([*heads, '>learning rate', '>training'], rows)}\n\n"
        f"Share of the digits recognised; {settings['epochs']} epochs in batches of {settings['rows']} with "
        f"{OPTIMIZERS[settings['optimizer']]}, width {settings['width']}, depth {settings['depth']}; learning rates "
        f"tried: {tried}; seeds on the official split: {seeds}, with a speaker left out: one. "
        f"{result['seconds']:,.0f} seconds for all on: {measured_on(result)}."
    )


if __name__ == "__main__":
    main()
