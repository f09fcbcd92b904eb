"""The conformance kit on models that are wrong on purpose, on right ones, and on Mamba of transformers.

    python benchmarks/conformance.py

Every wrong model must be caught by the check that is meant for it, and its fault be named; no right model may fail a
check that applies. Both for many seeds of weights and inputs; the slow checks for the first few only.
"""

import argparse
import importlib
import inspect
import re
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from common.report import RESULTS, markdown_table, measured_on, print_footer, print_table, write_report
from tqdm.auto import tqdm
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from hf_holo.eval.conformance import CHECKS, Subject, run_check, select

sys.path.append(str(Path(__file__).parents[1] / "tests/eval"))
wrong_models = importlib.import_module("wrong_models")  # the tests of the kit use the same

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "pad_token_id": 0}
SIZES |= {"bos_token_id": 1, "eos_token_id": 2}
HEADS = {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 16}
MEASURED = {
    "Mamba": (MambaForCausalLM, MambaConfig(**SIZES)),
    "Mamba2": (Mamba2ForCausalLM, Mamba2Config(**SIZES, **HEADS)),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--slow_seeds", type=int, default=1, help="seeds of the slow checks of right models")
    parser.add_argument("--models", nargs="+", help="only these of the wrong, right and measured models")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result file")
    args = parser.parse_args(argv)

    def chosen(models: dict) -> dict:
        return {name: model for name, model in models.items() if args.models is None or name in args.models}

    start = time.perf_counter()
    figures = {
        "seeds": args.seeds,
        "wrong": list(catch(chosen(wrong_models.FAULTS), args.seeds)),
        "right": list(accuse(chosen(wrong_models.RIGHT), args.seeds, args.slow_seeds)),
        "measured": list(measure(chosen(MEASURED))),
    }
    seconds = time.perf_counter() - start
    for rows in filter(None, (figures["wrong"], figures["right"], figures["measured"])):
        print_table([{key: shown(value) for key, value in row.items() if key != "messages"} for row in rows])
        print()
    path = write_report("conformance", figures, seed=0, seconds=seconds, folder=args.results)
    print_footer(path, seconds)


def shown(value: object) -> object:
    """`value` as it fits into a table."""
    return textwrap.shorten(value, 90) if isinstance(value, str) else value


def catch(faults: dict, seeds: int) -> Iterator[dict]:
    """One row for each wrong model and check that is meant for it: how often it is caught with its fault named."""
    for name, fault in tqdm(faults.items(), desc="wrong models"):
        subjects = [fault.model.subject(seed) for seed in range(seeds)]
        for check, message in fault.caught_by.items():
            results = [run_check(CHECKS[check], subject) for subject in subjects]
            caught = [r.detail for r in results if r.status == "failed" and re.search(message, r.detail)]
            yield {"wrong model": name, "check": check, "seeds": seeds, "caught": len(caught), "messages": caught[:1]}


def accuse(models: dict, seeds: int, slow_seeds: int) -> Iterator[dict]:
    """One row for each right model: how many checks it ran, and how many it failed."""
    for name, model in models.items():
        results = []
        for seed in tqdm(range(seeds), desc=name):
            subject = model.subject(seed)
            results += [run_check(check, subject) for check in select(None, quick=seed >= slow_seeds)]
        ran = [result for result in results if result.status != "not applicable"]
        failed = [f"{result.check}: {result.detail}" for result in ran if result.status == "failed"]
        yield {"right model": name, "seeds": seeds, "checks run": len(ran), "accused": len(failed), "messages": failed}


def measure(models: dict) -> Iterator[dict]:
    """One row for each check of a model of transformers, as it comes."""
    for name, (model_class, config) in models.items():
        subject = Subject(model_class, config, name=name)
        for check in tqdm(select(None, quick=False), desc=name):
            result = run_check(check, subject)
            yield {"model": name, "check": check.name, "status": result.status, "detail": result.detail}


def sentence(result: dict) -> str:
    f = result["figures"]
    wrong, right = {row["wrong model"] for row in f["wrong"]}, f["right"]
    missed = {row["wrong model"] for row in f["wrong"] if row["caught"] < row["seeds"]}
    return (
        f"{len(wrong - missed)} of {len(wrong)} models that are wrong on purpose caught with every one of {f['seeds']} "
        f"seeds; {sum(row['accused'] for row in right)} of {sum(row['checks run'] for row in right):,} checks failed "
        f"on {len(right)} right ones"
    )


def table(result: dict) -> str:
    """What the kit finds on wrong models, on right ones and on Mamba."""
    f = result["figures"]
    failed = [row for row in f["measured"] if row["status"] == "failed"]
    passed = [row["model"] for row in f["measured"] if row["status"] == "passed"]
    counts = ", ".join(f"{model} {passed.count(model)}" for model in dict.fromkeys(passed))
    return "\n".join(
        [
            markdown_table(
                ("wrong on purpose", "caught by", ">seeds", ">caught"),
                ((r["wrong model"], r["check"], r["seeds"], r["caught"]) for r in f["wrong"]),
            ),
            "",
            markdown_table(
                ("right", ">seeds", ">checks run", ">failed"),
                ((r["right model"], r["seeds"], f"{r['checks run']:,}", r["accused"]) for r in f["right"]),
            ),
            "",
            "What transformers' own recurrent models show, checks that they fail only:",
            "",
            markdown_table(
                ("model", "check", "what was seen"),
                ((r["model"], r["check"], textwrap.shorten(r["detail"].replace("|", "/"), 160)) for r in failed),
            ),
            "",
            f"Checks that they pass: {counts}. `python benchmarks/conformance.py` took {result['seconds']:.0f} seconds "
            f"on: {measured_on(result)}.",
        ]
    )


def table_of_checks() -> str:
    """The checks of the kit, from their own descriptions."""
    rows = []
    for check in select(None, quick=False):
        name = f"{check.name} (slow)" if check.slow else check.name
        rows.append((check.group, name, inspect.getdoc(check.function), ", ".join(check.needs)))
    return markdown_table(("group", "check", "what holds", "needs"), rows)


if __name__ == "__main__":
    main()
