"""A small Phi-3 becomes a HoloSpectralNet: all of its attention replaced by holographic mixers, then distilled.

    python benchmarks/transfer.py tinyshakespeare.txt

What lies in `--folder` is used again: a teacher that was trained before is not trained anew.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import Phi3Config, Phi3ForCausalLM

from hf_holo.training.data import read_documents, split_documents
from hf_holo.training.tokenizers import make_tokenizer
from hf_holo.training.train import main as train

WINDOW = 128  # tokens, of training and of scoring


def train_teacher(text: Path, folder: Path, steps: int, seed: int) -> None:
    """Train a Phi-3 of about a million parameters on characters with `hf-holo train`."""
    tokenizer = make_tokenizer("characters", split_documents(read_documents(str(text)), 0.1)[0])
    config = Phi3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=448,
        max_position_embeddings=512,
        original_max_position_embeddings=512,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    start = folder / "untrained"
    Phi3ForCausalLM(config).save_pretrained(start)
    tokenizer.save_pretrained(start)
    arguments = {
        "model_name_or_path": start,
        "train_file": text,
        "output_dir": folder / "teacher",
        "block_size": WINDOW,
        "stride": WINDOW // 2,
        "max_steps": steps,
        "warmup_steps": steps // 10,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 64,
        "logging_steps": 50,
        "eval_strategy": "no",
        "save_strategy": "no",
        "causality_check": "false",
        "overwrite": "true",  # an unfinished teacher has no sample yet
        "seed": seed,
    }
    train([part for name, value in arguments.items() for part in (f"--{name}", str(value))])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="text file; the last tenth validates")
    parser.add_argument("--folder", type=Path, default=Path("runs/transfer"), help="folder of the models")
    parser.add_argument("--teacher_steps", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    if not (args.folder / "teacher" / "sample.txt").exists():  # the last file that a run writes
        train_teacher(args.text, args.folder, args.teacher_steps, args.seed)


if __name__ == "__main__":
    main()
