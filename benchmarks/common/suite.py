"""All benchmarks: the result files, how each is measured, what it needs, and where its result is told."""

import json
import os
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType


@dataclass(frozen=True)
class Input:
    """A file or folder that a benchmark reads.

    Args:
        what: what it is, for those who have to find it.
        default: where it is if nothing else is said, relative to the working directory.
    """

    what: str
    default: str | None = None


INPUTS = {
    "TINYSHAKESPEARE": Input("`tinyshakespeare.txt`, 1.1 MB of plays, as in Karpathy's char-rnn"),
    "WIKITEXT2": Input("`wikitext2-valid.txt`, the validation part of WikiText-2 as plain text"),
    "BROWN": Input("`brown.txt`, the Brown corpus as plain text (NLTK has it)"),
    "SMOLLM2": Input("folder of SmolLM2-135M-Instruct, or of another small Llama, with its tokenizer"),
    "REVIEWS_TRAIN": Input("`train.parquet`, movie reviews with the columns `text` and `label`"),
    "REVIEWS_TEST": Input("`test.parquet`, likewise"),
    "CIFAR10": Input("folder of small photographs, `train.parquet` and `test.parquet` with `image` and `label`"),
    "MNIST": Input("folder of handwritten digits, `train.parquet` and `test.parquet` with `image` and `label`"),
    "FSDD": Input("folder of spoken digits, likewise with `audio` and `label` (Free Spoken Digit Dataset)"),
    "LAMBADA": Input("`lambada.jsonl`, passages with `context` and `target` (the last word), in OpenAI's form"),
    "SHAKESPEARE_RUN": Input("the model that `shakespeare` trains", "runs/shakespeare-char-hsn"),
    "STUDENTS": Input("the models that `surgery` converts", "runs/students"),
}
BOTH_TEXTS = "--text WIKITEXT2 TINYSHAKESPEARE --held_out 0.5 0.1"
RATES = "0.0005 0.001 0.002 0.004 0.008"
KEPT = f"--students {INPUTS['STUDENTS'].default}"


def input_path(name: str) -> str | None:
    """Where an input is: in the environment variable of its name, else at its default."""
    return os.environ.get(name) or INPUTS[name].default


@dataclass(frozen=True)
class Benchmark:
    """How one result file is measured.

    Args:
        script: file in `benchmarks`, without its ending.
        arguments: of the script. A word that names one of the INPUTS stands for its path.
        quick: needs no input and at most two minutes on two cores.
    """

    script: str
    arguments: str = ""
    quick: bool = False

    @property
    def inputs(self) -> list[str]:
        return [word for word in self.arguments.split() if word in INPUTS]

    @property
    def command(self) -> str:
        return f"python benchmarks/{self.script}.py {self.arguments}".strip()

    @property
    def module(self) -> ModuleType:
        """The script, whose functions `sentence` and, where there is one, `table` say what a result means."""
        return import_module(self.script)


GROUPS: dict[str, dict[str, Benchmark]] = {
    "learning": {
        "shakespeare": Benchmark("shakespeare", "TINYSHAKESPEARE"),
        "shakespeare_resonance": Benchmark("shakespeare", "TINYSHAKESPEARE --family resonance --steps 1500"),
        "llama_comparison_adamw": Benchmark("llama_comparison", "TINYSHAKESPEARE --optimizer adamw"),
        "llama_comparison_muon": Benchmark("llama_comparison", "TINYSHAKESPEARE --learning_rates 0.004"),
        "llama_filter": Benchmark("llama_filter", "TINYSHAKESPEARE"),
        "design_choices": Benchmark("design_choices", "TINYSHAKESPEARE --steps 300"),
        "design_choices_resonance": Benchmark("design_choices", "TINYSHAKESPEARE --family resonance --steps 300"),
        "holo_curve": Benchmark("holo_curve", "TINYSHAKESPEARE"),
        "vocabulary": Benchmark("vocabulary", "BROWN"),
        "python_code": Benchmark("python_code"),
        "infilling": Benchmark("infilling"),
        "movie_reviews": Benchmark("movie_reviews", f"REVIEWS_TRAIN REVIEWS_TEST --cpu --learning_rates {RATES}"),
        "vision_cifar10": Benchmark("vision", "CIFAR10"),
        "vision_mnist": Benchmark("vision", "MNIST --data mnist"),
        "audio": Benchmark("audio", "FSDD"),
        "multimodal_digit": Benchmark("multimodal", "MNIST FSDD --task digit --alone"),
        "multimodal_sum": Benchmark("multimodal", "MNIST FSDD --task sum"),
        "multimodal_new_pairs": Benchmark("multimodal", "MNIST FSDD --task new_pairs --weight_decays 0.1 1.0"),
    },
    "recall": {
        "pair_recall": Benchmark("pair_recall"),
        "far_recall": Benchmark("far_recall"),
        "multi_query_recall": Benchmark("multi_query_recall"),
        "state_tracking": Benchmark("state_tracking"),
        "memory_recall": Benchmark("memory_recall"),
    },
    "speed": {
        "block_speed": Benchmark("block_speed", quick=True),
        "block_speed_compiled": Benchmark("block_speed", "--compile"),
        "decode_speed": Benchmark("decode_speed", quick=True),
        "saved_prefix": Benchmark("saved_prefix"),
        "generation_speed": Benchmark("generation_speed", "--threads 1"),
        "speculative": Benchmark("speculative", "--threads 1"),
        "static_speed": Benchmark("static_speed", quick=True),
        "muon_precision": Benchmark("muon_precision", quick=True),
        "holo_speed": Benchmark("holo_speed", quick=True),
        "long_context": Benchmark("long_context", "--repeats 3"),
        "context_parallel": Benchmark("context_parallel"),
        "cost_model": Benchmark("cost_model"),
    },
    "correctness": {
        "stepwise_loss": Benchmark("stepwise_loss", "SHAKESPEARE_RUN TINYSHAKESPEARE"),
        "leaking_gate": Benchmark("leaking_gate", "TINYSHAKESPEARE"),
        "gradient_norms": Benchmark("gradient_norms", quick=True),
        "conformance": Benchmark("conformance"),
        "claims": Benchmark("claims", quick=True),
    },
    "conversion": {
        "surgery": Benchmark("surgery", f"SMOLLM2 {BOTH_TEXTS} --eval_windows 32 {KEPT}"),
        "pareto": Benchmark("pareto", f"SMOLLM2 {BOTH_TEXTS} --eval_windows 4 --lambada LAMBADA {KEPT}"),
        "distillation": Benchmark("distillation", f"SMOLLM2 STUDENTS {BOTH_TEXTS} --bf16"),
        "transfer": Benchmark("transfer", "TINYSHAKESPEARE"),
        "partial_transfer": Benchmark("partial_transfer", f"SMOLLM2 {BOTH_TEXTS} --bf16"),
        "large_conversion": Benchmark("large_conversion", "WIKITEXT2"),
    },
    "export": {
        "export_hsn_small": Benchmark("export", quick=True),
        "export_trained": Benchmark("export", "--model SHAKESPEARE_RUN --text TINYSHAKESPEARE"),
    },
}
SUITE = {name: benchmark for group in GROUPS.values() for name, benchmark in group.items()}
HEADLINES = {  # of the README, and the results that each is made of; the script of the first has the function
    "Learning a text": ("shakespeare",),
    "Against attention": ("llama_comparison_muon", "llama_filter"),
    "Decoding": ("decode_speed",),
    "Compression": ("surgery", "distillation"),
    "Long texts": ("long_context",),
}
TABLES = {  # of the pages in docs, by page and mark, likewise
    ("how-a-causal-model-cheats", "measured"): ("leaking_gate",),
    ("conformance", "measured"): ("conformance",),
    ("surgery", "measured"): ("surgery", "distillation"),
    ("surgery", "pareto"): ("pareto",),
    ("hsn", "options"): ("design_choices",),
    ("hsn", "counting"): ("state_tracking",),
    ("hsn", "far"): ("far_recall",),
    ("holo", "measured"): ("holo_curve",),
    ("resonance", "measured"): ("long_context",),
    ("parallel", "measured"): ("context_parallel",),
    ("scaling", "measured"): ("cost_model",),
    ("resonance", "gradients"): ("gradient_norms",),
    ("resonance", "options"): ("design_choices_resonance",),
    ("resonance", "recall"): ("pair_recall",),
    ("vocabulary", "measured"): ("vocabulary",),
    ("code", "recipes"): ("python_code",),
    ("code", "measured"): ("infilling",),
    ("memory", "measured"): ("memory_recall",),
    ("vision", "cifar10"): ("vision_cifar10",),
    ("vision", "mnist"): ("vision_mnist",),
    ("audio", "measured"): ("audio",),
    ("multimodal", "digit"): ("multimodal_digit",),
    ("multimodal", "sum"): ("multimodal_sum",),
    ("multimodal", "new pairs"): ("multimodal_new_pairs",),
}


def duration(seconds: float) -> str:
    """Seconds as a reader wants them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def recorded_seconds(name: str) -> float:
    """How long the kept result of a benchmark took; 0 if there is none."""
    path = Path(__file__).parents[1] / "results" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["seconds"] if path.exists() else 0.0
