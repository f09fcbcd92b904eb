"""A small Phi-3 becomes a HoloSpectralNet: all of its attention replaced by holographic mixers, then distilled.

    python benchmarks/transfer.py tinyshakespeare.txt

All losses are over the whole validation split, in windows of 128. Models that are in `--folder` already are used
again, the teacher too. The seconds are those of training; scoring is not counted.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from common.distilling import distil, shortened
from common.report import RESULTS, flags, print_footer, print_table, write_report
from transformers import Phi3Config, Phi3ForCausalLM

from hf_holo.conversion.surgery.transfer import transfer_to_hsn
from hf_holo.data.documents import read_documents, split_documents
from hf_holo.data.tokenizers import make_tokenizer
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
    train(flags(arguments))


def replaced(text: Path, folder: Path, stage_steps: int | None, seed: int) -> dict:
    """Transfer the weights of the teacher and distil, unless that has been done, and return the report."""
    teacher, student, distilled = (folder / name for name in ("teacher", "student", "distilled"))
    if not (distilled / "model.safetensors").exists():
        model = Phi3ForCausalLM.from_pretrained(teacher)
        torch.manual_seed(seed)
        transfer_to_hsn(model).save_pretrained(student)
    options = {"block_size": WINDOW, "seed": seed} | shortened(stage_steps)
    return distil("distill-hsn", teacher, student, distilled, [text], **options)


def figures(report: dict, text: str) -> dict:
    """What the report of the distillation says about losses on the held-out text, and the time it took."""
    rows = [{"stage": "before", "steps": 0, "seconds": 0.0, "loss": report["student"]["scores"][text]["loss"]}]
    for stage in report["stages"]:
        rows.append({"stage": stage["name"], **{key: stage[key] for key in ("steps", "seconds")}})
        rows[-1]["loss"] = stage["scores"][text]["loss"]
    teacher, student = report["teacher"]["scores"][text]["loss"], rows[-1]["loss"]
    return {
        "teacher_parameters": report["teacher"]["parameters"],
        "student_parameters": report["student"]["parameters"],
        "teacher_loss": teacher,
        "loss": student,
        "excess": student / teacher - 1,
        "steps": sum(row["steps"] for row in rows),
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "stages": rows,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="text file; the last tenth validates")
    parser.add_argument("--folder", type=Path, default=Path("runs/transfer"), help="folder of the models")
    parser.add_argument("--teacher_steps", type=int, default=1000)
    parser.add_argument("--stage_steps", type=int, help="steps of every stage; default: those of the recipe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)

    if not (args.folder / "teacher" / "sample.txt").exists():  # the last file that a run writes
        train_teacher(args.text, args.folder, args.teacher_steps, args.seed)
    report = replaced(args.text, args.folder, args.stage_steps, args.seed)
    found = figures(report, args.text.stem) | {"window": WINDOW, "teacher_steps": args.teacher_steps}
    print_table(found["stages"])
    print(f"teacher {found['teacher_loss']:.4f}, student {found['loss']:.4f}: {found['excess']:+.2%}")
    path = write_report("transfer", found, seed=args.seed, seconds=found["seconds"], folder=args.results)
    print_footer(path, found["seconds"])


def sentence(result: dict) -> str:
    f = result["figures"]
    return (
        f"a Phi-3 ({f['teacher_parameters']:,} parameters) whose attention is all replaced by holographic mixers: "
        f"{f['loss']:.4f} nats per character after {f['steps']} steps of distillation ({f['seconds']:.0f} s), the "
        f"teacher has {f['teacher_loss']:.4f} ({f['excess']:+.2%}); one seed"
    )


if __name__ == "__main__":
    main()
