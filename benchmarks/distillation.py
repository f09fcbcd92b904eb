"""What distillation brings back: the models that `benchmarks/surgery.py` converted learn from the one they come from.

    python benchmarks/surgery.py MODEL --students STUDENTS --text wikitext2-valid.txt tinyshakespeare.txt \\
        --held_out 0.5 0.1
    python benchmarks/distillation.py MODEL STUDENTS --text wikitext2-valid.txt tinyshakespeare.txt --held_out 0.5 0.1

Every student is trained with `hf-holo distill` on the part of the texts that calibrated it (distill-surgery, or
distill-attention where attention alone was converted), and its perplexity is measured on the windows that surgery.json
names. The seconds are those of training, without scoring. Models that are in `--folder` already are used again,
and rows that the result file holds already are not measured again.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from common.distilling import distil
from common.report import RESULTS, earlier_rows, print_footer, print_table, read_report, write_report
from surgery import CALIBRATED, NOT_REFITTED, SCOPE_NAMES, Trial, ratios
from transformers import AutoModelForCausalLM

from hf_holo.conversion.convert.arguments import ConvertArguments
from hf_holo.conversion.sources import Source, Text, calibration_texts, load_tokenizer

CHOSEN = {"all": CALIBRATED, "attention": NOT_REFITTED}  # the conversion that is better after distillation
RECIPES = {"all": "distill-surgery", "attention": "distill-attention"}
GLANCE = 2  # held-out windows that the distillation itself scores; here they are scored on many more


def distilled(recipe: str, student: Path, folder: Path, window: int, args: argparse.Namespace) -> dict:
    """Train this student, and return what its report says about the training."""
    options = {"validation_fraction": args.held_out, "block_size": window, "eval_windows": GLANCE}
    options |= {"bf16": args.bf16, "seed": args.seed} | ({"max_steps": args.steps} if args.steps else {})
    report = distil(recipe, args.model, student, folder, args.text, **options)
    (stage,) = report["stages"]
    return {"recipe": recipe, **{key: stage[key] for key in ("trained", "steps", "tokens", "seconds")}}


def measured(folder: Path, texts: Sequence[Text]) -> dict[str, float]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return {text.name: text.perplexity(model, text.name) for text in texts}


def trained_seconds(rows: Sequence[dict]) -> float:
    return sum(row["seconds"] for row in rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="folder of the teacher")
    parser.add_argument("students", metavar="STUDENTS", type=Path, help="folder of the converted models")
    parser.add_argument("--text", nargs="+", required=True)
    parser.add_argument("--held_out", nargs="+", type=float, default=[0.1], help="share at the end of each text")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.8, 0.7, 0.6, 0.4], help="students to distil")
    parser.add_argument("--steps", type=int, help="of every distillation; default: those of the recipe")
    parser.add_argument("--bf16", action="store_true", help="where the processor knows that type: half the time")
    parser.add_argument("--folder", type=Path, default=Path("runs/distillation"), help="folder of the distilled models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    args = parser.parse_args(argv)

    before = read_report("surgery", args.results)["figures"]
    if not before:
        parser.error(f"{args.results} does not hold surgery.json: run benchmarks/surgery.py with --students first")
    sizes = dict.fromkeys(("block_size", "tokens", "fisher_tokens"), before["window"])  # nothing is calibrated here
    windows = max(before["held_out_windows"].values())
    options = ConvertArguments(train_file=args.text, validation_fraction=args.held_out, eval_windows=windows, **sizes)
    texts = calibration_texts(options, load_tokenizer(args.model), Source.find(args.model))
    teacher, *converted = before["rows"]
    settings = {"bf16": args.bf16, "teacher": teacher}
    rows, _ = earlier_rows("distillation", settings, args.results)
    done = {(row["method"], row["scope"], row["ratio"]) for row in rows}
    for row in converted:
        trial = Trial(row["method"], row["scope"], row["ratio"])
        student, folder = args.students / trial.folder, args.folder / trial.folder
        wanted = trial.method == CHOSEN[trial.scope] and trial.ratio in args.ratios
        if not wanted or trial in done or not student.is_dir():
            continue
        training = distilled(RECIPES[trial.scope], student, folder, before["window"], args)
        scores = measured(folder, texts)
        zero_shot = {f"{name} before": row[name] for name in ratios(scores, teacher)}
        rows.append({**trial._asdict(), "kept": row["kept"], **training, **zero_shot, **scores})
        rows[-1] |= ratios(scores, teacher)
        print_table(rows[-1:])
        figures = settings | {"rows": rows}
        write_report("distillation", figures, seed=args.seed, seconds=trained_seconds(rows), folder=args.results)
    if not rows:
        parser.error(f"{args.students} has none of the models in surgery.json")
    print_table(rows)
    print_footer(args.results / "distillation.json", trained_seconds(rows))


def sentence(result: dict) -> str:
    rows = []
    for row in result["figures"]["rows"]:
        texts = [key.removesuffix(", ratio") for key in row if key.endswith(", ratio")]
        after = " / ".join(f"{row[text + ', ratio']:.3g}" for text in texts)
        before = " / ".join(f"{row[text + ', ratio before']:.3g}" for text in texts)
        rows.append(
            f"{row['kept']:.0%} of {SCOPE_NAMES[row['scope']]} kept: {after} (before: {before}) "
            f"after {row['seconds'] / 60:.0f} minutes, {row['tokens'] / 1e3:.0f} k tokens"
        )
    return f"the same perplexities after distillation: {'; '.join(rows)}; one seed"


if __name__ == "__main__":
    main()
