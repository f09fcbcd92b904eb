"""Write the figures of results/*.json, and other tables, between their marks in the README and in the pages of docs.

    python benchmarks/readme.py

Every row of the README names the command that it comes from, and the seconds that the command took.
"""

import inspect
import textwrap
from collections.abc import Callable
from pathlib import Path

from holo_curve import best
from pair_recall import best as best_recall
from python_code import RECIPES
from report import RESULTS, read_report

from hf_holo.eval.conformance import select

ROOT = Path(__file__).parents[1]
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}
SCOPES = {"all": "all linear layers", "attention": "those of attention"}  # of surgery.py


def shakespeare(f: dict) -> str:
    return (
        f"{f['validation_loss']:.3f} nats per character over the whole validation split of tinyshakespeare "
        f"({f['parameters']:,} parameters, {f['tokens'] / 1e6:.1f} M tokens, windows of {f['window']})"
    )


def llama_comparison(f: dict) -> str:
    settings, best = f["settings"], f["best"]
    rates = sorted({run["learning_rate"] for run in f["runs"]})
    chosen = f"each at its best of the learning rates {rates}" if len(rates) > 1 else f"learning rate {rates[0]}"
    return (
        f"{best['hsn']:.3f} nats, Llama of the same size {best['llama']:.3f}, after {settings['steps']} steps of "
        f"{settings['rows']}×{settings['length']} with {OPTIMIZERS[settings['optimizer']]}, {chosen}"
    )


def stepwise_loss(f: dict) -> str:
    return f"loss one token at a time {f['stepwise']:.5f}, over the whole window {f['teacher_forced']:.5f}"


def block_speed(f: dict) -> str:
    rows = [f"{r['time_ratio']:.2f} ({r['tokens']:,} tokens, width {r['width']})" for r in f["against_llama"]]
    growth = [row["relative"] for row in f["time_per_token"]]
    lengths = [row["tokens"] for row in f["time_per_token"]]
    return (
        f"time of a training step of one block, Llama's being 1: {', '.join(rows)}; time per token between "
        f"{lengths[0]:,} and {lengths[-1]:,} tokens: {min(growth):.2f} to {max(growth):.2f} of the first"
    )


def decode_speed(f: dict) -> str:
    first, last = f["rows"][0], f["rows"][-1]
    return (
        f"time per token after {last['context']:,} tokens is {last['relative']:.2f} of that after {first['context']:,}"
    )


def static_speed(f: dict) -> str:
    first, last = f["rows"][0], f["rows"][-1]
    return (
        f"static binding: {last['tokens'] / first['tokens']:.0f} times the tokens ({last['tokens']:,}) "
        f"take {last['times_time']:.2f} times the time"
    )


def design_choices(f: dict) -> str:
    first = f["runs"][0]["seed"]
    rows = [f"{row['variant']} {row['loss']:.3f}" for row in f["runs"] if row["seed"] == first]
    settings = f["settings"]
    budget = f"{settings['steps']} steps" if "steps" in settings else f"{settings['seconds']:.0f} seconds"
    return f"validation loss after {budget} of training: {', '.join(rows)}"


def python_code(f: dict) -> str:
    rows = {row["part"]: row for row in f["rows"]}
    parts = [
        f"{recipe} {rows[part]['validation_loss']:.3f} nats per token, {rows[part]['validation_accuracy']:.1%} right"
        for part, recipe in RECIPES.items()
        if part in rows
    ]
    if "classification" in rows:
        shares = [f"{name} {share:.1%}" for name, share in rows["classification"]["accuracies"].items()]
        parts.append(f"package of a file: {', '.join(shares)}")
    return f"on held-out files of Python's standard library: {'; '.join(parts)}"


def pair_recall(f: dict) -> str:
    settings, rows = f["settings"], best_recall(f["runs"])
    shares = [f"{run['model']} {run['near']:.0%} / {run['far']:.0%}" for run in rows]
    return (
        f"{settings['pairs']} pairs looked up after {settings['filler']} / {settings['longer_filler']} tokens of "
        f"filler, {settings['steps']:,} steps on {settings['filler']}: {'; '.join(shares)}"
    )


def conformance(f: dict) -> str:
    wrong, right = {row["wrong model"] for row in f["wrong"]}, f["right"]
    missed = {row["wrong model"] for row in f["wrong"] if row["caught"] < row["seeds"]}
    return (
        f"{len(wrong - missed)} of {len(wrong)} models that are wrong on purpose caught with every one of {f['seeds']} "
        f"seeds; {sum(row['accused'] for row in right)} of {sum(row['checks run'] for row in right):,} checks failed "
        f"on {len(right)} right ones"
    )


def leaking_gate(f: dict) -> str:
    rows = [
        f"{row['gate']} gate {row['teacher_forced']:.2f} with the whole window in view, "
        f"{row['prefix_only']:.2f} with only the past"
        for row in f["models"]
    ]
    steps, guessing = f["settings"]["steps"], f["guessing"]
    return f"nats per character after {steps:,} steps: {'; '.join(rows)}; guessing {guessing:.2f}"


def surgery(f: dict) -> str:
    texts = list(f["held_out_windows"])
    rows = []
    for row in f["rows"][1:]:  # the first is the teacher itself
        ratios = " / ".join(f"{row[text + ', ratio']:.3g}" for text in texts)
        rows.append(f"{row['method']}, {row['kept']:.0%} of {SCOPES[row['scope']]} kept: {ratios}")
    windows = " / ".join(f"{count} windows of {text}" for text, count in f["held_out_windows"].items())
    return (
        f"perplexity after converting linear layers of a {f['model']} with {f['parameters']:,} parameters, "
        f"not trained afterwards, divided by the teacher's, on {windows}: {'; '.join(rows)}"
    )


def distillation(f: dict) -> str:
    rows = []
    for row in f["rows"]:
        texts = [key.removesuffix(", ratio") for key in row if key.endswith(", ratio")]
        ratios = " / ".join(f"{row[text + ', ratio']:.3g}" for text in texts)
        before = " / ".join(f"{row[text + ', ratio before']:.3g}" for text in texts)
        rows.append(
            f"{row['kept']:.0%} of {SCOPES[row['scope']]} kept: {ratios} (before: {before}) "
            f"after {row['seconds'] / 60:.0f} minutes, {row['tokens'] / 1e3:.0f} k tokens"
        )
    return f"the same perplexities after distillation: {'; '.join(rows)}"


def transfer(f: dict) -> str:
    return (
        f"a Phi-3 ({f['teacher_parameters']:,} parameters) whose attention is all replaced by holographic mixers: "
        f"{f['loss']:.4f} nats per character after {f['steps']} steps of distillation ({f['seconds']:.0f} s), the "
        f"teacher has {f['teacher_loss']:.4f} ({f['excess']:+.2%})"
    )


def partial_transfer(f: dict) -> str:
    (first, *_) = f["texts"].values()
    ratios = ", ".join(f"{ratio:.3f} ({text})" for text, ratio in f["ratios"].items())
    return (
        f"{len(f['layers'])} of the {f['depth']} attention layers of a model with {first['teacher_parameters']:,} "
        f"parameters replaced by holographic mixers: perplexity divided by the teacher's {ratios} after "
        f"{first['steps']} steps of distillation ({first['seconds'] / 60:.0f} minutes)"
    )


def large_conversion(f: dict) -> str:
    return (
        f"converting {f['blocks']} of the {f['depth']} blocks of a Phi-3 with {f['parameters']:,} parameters in "
        f"bfloat16 ({f['weights_gib']:.1f} GiB), statistics of {f['memory']:g} GiB at a time, takes at most "
        f"{f['peak_gib']:.1f} GiB of memory"
    )


def holo_speed(f: dict) -> str:
    first = f["layers"][0]
    layers = [
        f"{row['layer']} {row['times_quicker']:.1f} ({row['threads']} threads)"
        for row in f["layers"]
        if row["layer"] != first["layer"]
    ]
    decoding = [f"{row['factors']} {row['time_ratio']:.2f}" for row in f["decoding"]]
    return (
        f"a training step of HoloLinear {first['width']}→{first['width']} with {first['harmonics']} harmonics, "
        f"{first['tokens']} tokens, is quicker than nn.Linear's by the factors: {', '.join(layers)}; decoding with "
        f"{f['decoding'][0]['kept']:.0%} of the numbers kept, time per token of the dense model being 1: "
        f"{', '.join(decoding)}"
    )


def holo_curve(f: dict) -> str:
    dense, *others = best(f["runs"])
    rows = [f"dense twin {dense['loss']:.3f}"]
    for run in others:
        share = run["block_parameters"] / dense["block_parameters"]
        rows.append(f"{run['basis']} {run['harmonics']} ({share:.2f} of the parameters) {run['loss']:.3f}")
    return f"HOLO from scratch, nats per character by basis and harmonics: {', '.join(rows)}"


def long_context(f: dict) -> str:
    settings = f["settings"]
    parts = {
        "reading": lambda r: f"reading {r['tokens']:,} tokens takes {r['seconds']:.0f} s and {r['peak_gib']:.2f} GiB",
        "speed": lambda r: f"time per token there {r[-1]['relative']:.2f} of that at {r[0]['tokens']:,}",
        "training": lambda r: f"a training step over {r['tokens']:,} takes {r['peak_gib']:.2f} GiB",
        "pieces": lambda r: f"in pieces the logits differ by {max(x['fed_in_pieces'] for x in r):.0e} at most",
        "decoding": lambda r: (
            f"a token after {r[-1]['context']:,} takes {r[-1]['relative']:.2f} of one after {r[0]['context']:,}"
        ),
        "stability": lambda r: f"the largest state after {r[-1]['tokens']:,} tokens is {r[-1]['largest_state']:.3g}",
    }
    return f"`{settings['preset']}`: " + "; ".join(say(f[part]) for part, say in parts.items() if part in f)


def vocabulary(f: dict) -> str:
    settings, large = f["settings"], f["large_step"]
    runs = [f"{run['strategy']} {run['loss']:.3f}" for run in f["runs"]]
    return (
        f"nats per token with {settings['vocab_size']:,} tokens, {settings['steps']} steps: {', '.join(runs)}; "
        f'"hash" at {large["vocab_size"]:,}×{large["width"]}: 1/{large["compression"]:.1f} of the dense numbers, a '
        f"training step of {large['tokens']} tokens peaks at {large['peak_gib']:.2f} GiB"
    )


def infilling(f: dict) -> str:
    rows = ", ".join(f"{name} {accuracy:.1%}" for name, accuracy in f["best"].items() if accuracy is not None)
    return (
        f"masked tokens of held-out Python files that are filled right, after {f['steps']} steps of "
        f"{f['windows_a_step']}×{f['length']} at equal parameters, each at its best learning rate: {rows}; always the "
        f"commonest token {f['commonest_token']:.1%}"
    )


def movie_reviews(f: dict) -> str:
    settings = f["settings"]
    rows = ", ".join(f"{row['model']} {row['accuracy']:.1%} ({row['parameters']:,} parameters)" for row in f["rows"])
    return (
        f"whole movie reviews judged right, ± {max(row['standard_error'] for row in f['rows']):.1%}, by models that "
        f"have seen {settings['train_reviews']:,} of them {settings['epochs']:g} times and nothing else, each at its "
        f"best of the learning rates {settings['learning_rates']}, ModernBERT the first {settings['bert_length']} "
        f"tokens only: {rows}"
    )


def exported(f: dict) -> str:
    rows = []
    for row in f["rows"]:
        rise = f", perplexity {row['perplexity_rise']:+.2%}" if "perplexity_rise" in row else ""
        rows.append(
            f"{row['format']} {row['of_the_weights']:.2f} of the float32 weights, "
            f"{row['of_eager_pytorch']:.2f} of eager PyTorch's time per token{rise}"
        )
    return f"a model of {f['parameters']:,} parameters out of Python: {'; '.join(rows)}"


ROWS: dict[str, Callable[[dict], str]] = {
    "shakespeare": shakespeare,
    "shakespeare_resonance": shakespeare,
    "llama_comparison_adamw": llama_comparison,
    "llama_comparison_muon": llama_comparison,
    "stepwise_loss": stepwise_loss,
    "block_speed": block_speed,
    "decode_speed": decode_speed,
    "static_speed": static_speed,
    "design_choices": design_choices,
    "design_choices_resonance": design_choices,
    "pair_recall": pair_recall,
    "python_code": python_code,
    "conformance": conformance,
    "leaking_gate": leaking_gate,
    "surgery": surgery,
    "distillation": distillation,
    "transfer": transfer,
    "partial_transfer": partial_transfer,
    "large_conversion": large_conversion,
    "holo_speed": holo_speed,
    "holo_curve": holo_curve,
    "long_context": long_context,
    "vocabulary": vocabulary,
    "infilling": infilling,
    "movie_reviews": movie_reviews,
    "export_hsn_small": exported,
    "export_trained": exported,
}


def table(folder: Path = RESULTS) -> str:
    """The figures as a Markdown table; benchmarks that have not run are left out."""
    lines, machines = ["| benchmark | measured | seconds |", "|---|---|--:|"], {}
    for name, describe in ROWS.items():
        report = read_report(name, folder)
        if report["figures"]:
            lines.append(f"| `{name}` | {describe(report['figures'])} | {report['seconds']:.0f} |")
            machines[_machine(report)] = None
    return "\n".join([*lines, "", f"Measured on: {'; '.join(machines)}."])


def _machine(report: dict) -> str:
    machine, versions = report["machine"], report["versions"]
    return (
        f"{machine['processor']}, {machine['threads']} threads, torch {versions['torch']}, "
        f"transformers {versions['transformers']}"
    )


def leak_table(folder: Path = RESULTS) -> str:
    """Both losses of both gates as a Markdown table."""
    report = read_report("leaking_gate", folder)
    f = report["figures"]
    lines = [
        "| gate | whole window in view | only the past in view | `check_causality(model).lookahead` |",
        "|---|--:|--:|--:|",
    ]
    for row in f["models"]:
        losses = f"{row['teacher_forced']:.2f} | {row['prefix_only']:.2f}"
        lines.append(f"| {row['gate']} | {losses} | {row['lookahead']} tokens |")
    return "\n".join(
        [
            *lines,
            "",
            f"Nats per character after {f['settings']['steps']:,} steps, over {f['settings']['predictions']} "
            f"predictions; guessing has {f['guessing']:.2f}.",
            f"It took {report['seconds']:.0f} seconds for both models on: {_machine(report)}.",
        ]
    )


def kit_table(folder: Path = RESULTS) -> str:
    """What the conformance kit finds on wrong models, on right ones and on Mamba, as Markdown tables."""
    report = read_report("conformance", folder)
    f = report["figures"]
    lines = ["| wrong on purpose | caught by | seeds | caught |", "|---|---|--:|--:|"]
    lines += [f"| {r['wrong model']} | {r['check']} | {r['seeds']} | {r['caught']} |" for r in f["wrong"]]
    lines += ["", "| right | seeds | checks run | failed |", "|---|--:|--:|--:|"]
    lines += [f"| {r['right model']} | {r['seeds']} | {r['checks run']:,} | {r['accused']} |" for r in f["right"]]
    lines += ["", "What transformers' own recurrent models show, checks that they fail only:"]
    lines += ["", "| model | check | what was seen |", "|---|---|---|"]
    failed = [row for row in f["measured"] if row["status"] == "failed"]
    lines += [
        f"| {r['model']} | {r['check']} | {textwrap.shorten(r['detail'].replace('|', '/'), 160)} |" for r in failed
    ]
    passed = [row["model"] for row in f["measured"] if row["status"] == "passed"]
    counts = ", ".join(f"{model} {passed.count(model)}" for model in dict.fromkeys(passed))
    lines += [
        "",
        f"Checks that they pass: {counts}. `python benchmarks/conformance.py` took {report['seconds']:.0f} seconds",
    ]
    return "\n".join(lines) + f" on: {_machine(report)}."


def surgery_table(folder: Path = RESULTS) -> str:
    """Perplexities after surgery, and after distillation, as a Markdown table."""
    report, later = read_report("surgery", folder), read_report("distillation", folder)
    texts = report["figures"]["held_out_windows"]
    distilled = {(r["method"], r["scope"], r["ratio"]): r for r in later["figures"].get("rows", [])}
    lines = [
        f"| method | layers | kept | {' | '.join(texts)} | distilled: {' | distilled: '.join(texts)} |",
        "|---|---|--:|" + "--:|" * 2 * len(texts),
    ]
    for row in report["figures"]["rows"][1:]:  # the first is the teacher itself
        after = distilled.get((row["method"], row["scope"], row["ratio"]))
        cells = [f"{row[f'{text}, ratio']:.4g}" for text in texts]
        cells += [f"{after[f'{text}, ratio']:.4g}" if after else "" for text in texts]
        lines.append(f"| {row['method']} | {SCOPES[row['scope']]} | {row['kept']:.0%} | {' | '.join(cells)} |")
    windows = ", ".join(f"{count} windows of {text}" for text, count in texts.items())
    lines += ["", f"Perplexity divided by the teacher's, on {windows} that nothing was fitted to."]
    if distilled:
        minutes = max(row["seconds"] for row in distilled.values()) / 60
        tokens = max(row["tokens"] for row in distilled.values())
        lines.append(f"Distilled: {minutes:.0f} minutes at most, {tokens:,} tokens, on: {_machine(later)}.")
    return "\n".join(lines)


def curve_table(folder: Path = RESULTS) -> str:
    """HOLO from scratch beside its dense twin, as a Markdown table and the figure of the benchmark."""
    report = read_report("holo_curve", folder)
    settings, (dense, *others) = report["figures"]["settings"], best(report["figures"]["runs"])
    lines = [
        "| basis | harmonics | trained in the blocks | of the twin's | stored | nats per character | above the twin |",
        "|---|--:|--:|--:|--:|--:|--:|",
        f"| dense twin | | {dense['block_parameters']:,} | 1 | {dense['stored']:,} | {dense['loss']:.3f} | |",
    ]
    for run in others:
        share, above = run["block_parameters"] / dense["block_parameters"], run["loss"] - dense["loss"]
        lines.append(
            f"| {run['basis']} | {run['harmonics']} | {run['block_parameters']:,} | {share:.2f} | {run['stored']:,} | "
            f"{run['loss']:.3f} | {above:+.3f} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            "![Validation loss over the harmonics](images/holo_curve.png)",
            "",
            f"{settings['steps']} steps of {settings['rows']}×{settings['length']} with AdamW, width "
            f"{settings['width']}, depth {settings['depth']}, {report['seconds']:,.0f} seconds for all "
            f"{len(report['figures']['runs'])} runs on: {_machine(report)}.",
        ]
    )


def long_table(folder: Path = RESULTS) -> str:
    """What long texts cost, as a Markdown table."""
    report = read_report("long_context", folder)
    f = report["figures"]
    (short, long), (early, late), read, step = f["speed"], f["decoding"], f["reading"], f["training"]
    lines = [
        "| | tokens | peak memory | time |",
        "|---|--:|--:|--:|",
        f"| reading, logits of the last position | {read['tokens']:,} | {read['peak_gib']:.2f} GiB | "
        f"{read['seconds']:.0f} s |",
        f"| the same, per token | {short['tokens']:,} | | {short['us_per_token']:.0f} µs |",
        f"| | {long['tokens']:,} | | {long['us_per_token']:.0f} µs |",
        f"| a training step with gradient checkpointing | {step['tokens']:,} | {step['peak_gib']:.2f} GiB | "
        f"{step['seconds']:.0f} s |",
        f"| one more token after | {early['context']:,} | state {early['state_bytes']:,} B | "
        f"{early['ms_per_token']:.1f} ms |",
        f"| | {late['context']:,} | state {late['state_bytes']:,} B | {late['ms_per_token']:.1f} ms |",
        "",
        f"Segments and pieces of {', '.join(str(row['piece']) for row in f['pieces'])} tokens change the logits of "
        f"{f['pieces'][0]['tokens']:,} tokens by at most {max(row['fed_in_pieces'] for row in f['pieces']):.0e}. "
        f"Memory includes Python and its packages, {read['before_gib']:.2f} GiB. `{f['settings']['preset']}` with "
        f"random weights, {report['seconds']:.0f} seconds for all on: {_machine(report)}.",
    ]
    return "\n".join(lines)


def gradient_line(folder: Path = RESULTS) -> str:
    """How much the gradients of both kinds of weights vary over depth and over length, as a sentence."""
    report = read_report("gradient_norms", folder)
    rows = [
        f"{row['varies_over_depth']:.2f} over depth and {row['varies_over_length']:.2f} over length with weights as "
        f"{row['weights']}"
        for row in report["figures"]["rows"]
    ]
    return f"The largest gradient of the first block, divided by the smallest: {'; '.join(rows)}."


def choices_table(folder: Path = RESULTS) -> str:
    """What each option of Resonance is worth in training on a text, as a Markdown table."""
    report = read_report("design_choices_resonance", folder)
    f = report["figures"]
    settings, taken = f["settings"], f["step_seconds"]
    default = {run["seed"]: run["loss"] for run in f["runs"] if run["variant"] == "default"}
    lines = [
        "| | parameters | nats per character, per seed | beside the default | time of a step |",
        "|---|--:|--:|--:|--:|",
    ]
    for variant in taken:
        runs = [run for run in f["runs"] if run["variant"] == variant]
        losses = ", ".join(f"{run['loss']:.3f}" for run in runs)
        beside = ", ".join(f"{round(run['loss'] - default[run['seed']], 3) + 0.0:+.3f}" for run in runs)  # no "-0.000"
        cost = taken[variant] / taken["default"]
        lines.append(f"| {variant} | {runs[0]['parameters']:,} | {losses} | {beside} | {cost:.2f} |")
    return "\n".join(
        [
            *lines,
            "",
            f"{settings['steps']} steps of {settings['rows']}×{settings['length']} characters of tinyshakespeare with "
            f"Muon, width {settings['width']}, depth {settings['depth']}, one learning rate, seeds "
            f"{', '.join(map(str, sorted(default)))}; the loss is that of the whole validation split, the time that of "
            f"a forward and a backward pass. {report['seconds']:,.0f} seconds for all on: {_machine(report)}.",
        ]
    )


def pair_recall_table(folder: Path = RESULTS) -> str:
    """What each model looks up, near and far, at its best learning rate, as a Markdown table."""
    report = read_report("pair_recall", folder)
    f = report["figures"]
    settings, rates = f["settings"], sorted({run["learning_rate"] for run in f["runs"]})
    near, far = settings["filler"], settings["longer_filler"]
    lines = [
        f"| | parameters | {near:,} tokens of filler | {far:,} tokens | learning rate |",
        "|---|--:|--:|--:|--:|",
    ]
    for run in best_recall(f["runs"]):
        shares = f"{run['near']:.1%} | {run['far']:.1%}"
        lines.append(f"| {run['model']} | {run['parameters']:,} | {shares} | {run['learning_rate']} |")
    return "\n".join(
        [
            *lines,
            "",
            f"Share of {settings['pairs']} keys whose value is named, out of {settings['symbols']} values; "
            f"{settings['steps']:,} steps of {settings['rows']} sequences with {near} tokens of filler, each model at "
            f"the best of the learning rates {rates}, width {settings['width']}, depth {settings['depth']}, one seed. "
            f"{report['seconds']:,.0f} seconds for all on: {_machine(report)}.",
        ]
    )


def vocabulary_table(folder: Path = RESULTS) -> str:
    """Losses of all strategies after equal training, as a Markdown table."""
    report = read_report("vocabulary", folder)
    runs, settings = report["figures"]["runs"], report["figures"]["settings"]
    lines = [
        "| strategy | numbers for the vocabulary | of the dense ones | nats per token | beside dense |",
        "|---|--:|--:|--:|--:|",
    ]
    for run in runs:
        share = f"1/{run['compression']:.1f}" if run["compression"] > 1 else "all"
        lines.append(
            f"| {run['strategy']} | {run['parameters']:,} | {share} | {run['loss']:.3f} | {run['excess']:+.3f} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            f"{settings['steps']} steps of {settings['rows']}×{settings['length']}, so hardly trained yet, with "
            f"{settings['vocab_size']:,} tokens of BPE, width {settings['width']}, depth {settings['depth']}, one "
            f"learning rate, {report['seconds']:.0f} seconds for all on: {_machine(report)}.",
        ]
    )


def infilling_table(folder: Path = RESULTS) -> str:
    """How many masked tokens both models fill right, at each learning rate, as a Markdown table."""
    report = read_report("infilling", folder)
    f, long_file = report["figures"], report["figures"]["long_file"]
    lines = ["| model | parameters | learning rate | nats per hidden token | filled right |", "|---|--:|--:|--:|--:|"]
    lines += [
        f"| {r['model']} | {r['parameters']:,} | {r['learning_rate']} | {r['loss']:.3f} | {r['accuracy']:.1%} |"
        for r in f["rows"]
    ]
    return "\n".join(
        [
            *lines,
            "",
            f"{f['steps']} steps of {f['windows_a_step']}×{f['length']} with {OPTIMIZERS[f['optimizer']]}, "
            f"{f['vocab_size']:,} tokens of BPE, {f['hidden_tokens']:,} gaps in held-out files; always the commonest "
            f"token: {f['commonest_token']:.1%}. The pipeline fills a gap in a file of {long_file['tokens']:,} tokens "
            f"in {long_file['seconds']:.0f} seconds and {long_file['peak_gib']:.1f} GiB. "
            f"{report['seconds']:.0f} seconds for all runs on: {_machine(report)}.",
        ]
    )


def code_table(folder: Path = RESULTS) -> str:
    """What the recipes for code reach, and what the example that classifies files does, as Markdown tables."""
    report = read_report("python_code", folder)
    rows = {row["part"]: row for row in report["figures"]["rows"]}
    lines = [
        "| recipe | parameters | tokens read | nats per token | right at first guess | minutes |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for part, recipe in RECIPES.items():
        row = rows[part]
        lines.append(
            f"| {recipe} | {row['parameters']:,} | {row['tokens']:,} | {row['validation_loss']:.3f} | "
            f"{row['validation_accuracy']:.1%} | {row['seconds'] / 60:.0f} |"
        )
    lines += ["", "| package of a file | right |", "|---|--:|"]
    lines += [f"| {name} | {share:.1%} |" for name, share in rows["classification"]["accuracies"].items()]
    minutes = rows["classification"]["seconds"] / 60
    lines += ["", f"The classifier started from python-code and took {minutes:.0f} minutes. {_machine(report)}."]
    return "\n".join(lines)


def recall_table(folder: Path = RESULTS) -> str:
    """What a memory of 1,024 phasors recalls, and how far every dimension is from theory, as Markdown tables."""
    report = read_report("memory_recall", folder)
    points, ways = report["points"], ("one_shot", "cancelled")
    lines = ["| pairs | one-shot | theory | with cancellation | theory |", "|--:|--:|--:|--:|--:|"]
    for point in points:
        if point["dimension"] == 1024 and point["pairs"] >= 48:  # fewer are all recalled
            shares = (point[name + kind] for name in ways for kind in ("", "_theory"))
            lines.append(f"| {point['pairs']:,} | {' | '.join(f'{share:.1%}' for share in shares)} |")
    lines += ["", "| phasors | one-shot is off theory by at most | with cancellation by at most |", "|--:|---|---|"]
    for dimension in dict.fromkeys(point["dimension"] for point in points):
        own = [point for point in points if point["dimension"] == dimension]
        cells = []
        for name in ways:
            far = max(own, key=lambda point: abs(point[name] - point[f"{name}_theory"]))
            share, theory = far[name], far[f"{name}_theory"]
            cells.append(f"{100 * (share - theory):+.1f} points: {share:.1%} of {far['pairs']:,} pairs")
        lines.append(f"| {dimension:,} | {' | '.join(cells)} |")
    return "\n".join(
        [
            *lines,
            "",
            f"{report['codes']:,} codes, {report['rounds']} rounds of cancellation; one-shot over at least "
            f"{min(point['one_shot_reads'] for point in points):,} pairs a point, cancellation over at least "
            f"{min(point['cancelled_reads'] for point in points):,}; {report['seconds']:,.0f} seconds by the clock "
            f"for all {len(points)} points.",
        ]
    )


def check_table() -> str:
    """The checks of the conformance kit, from their own descriptions."""
    lines = ["| group | check | what holds | needs |", "|---|---|---|---|"]
    for check in select(None, quick=False):
        name = f"{check.name} (slow)" if check.slow else check.name
        lines.append(f"| {check.group} | {name} | {inspect.getdoc(check.function)} | {', '.join(check.needs)} |")
    return "\n".join(lines)


DOCS = ROOT / "docs"
TABLES: dict[tuple[Path, str], Callable[[], str]] = {
    (ROOT / "README.md", "measured"): table,
    (DOCS / "how-a-causal-model-cheats.md", "measured"): leak_table,
    (DOCS / "conformance.md", "measured"): kit_table,
    (DOCS / "conformance.md", "checks"): check_table,
    (DOCS / "surgery.md", "measured"): surgery_table,
    (DOCS / "holo.md", "measured"): curve_table,
    (DOCS / "resonance.md", "measured"): long_table,
    (DOCS / "resonance.md", "gradients"): gradient_line,
    (DOCS / "resonance.md", "options"): choices_table,
    (DOCS / "resonance.md", "recall"): pair_recall_table,
    (DOCS / "vocabulary.md", "measured"): vocabulary_table,
    (DOCS / "code.md", "recipes"): code_table,
    (DOCS / "code.md", "measured"): infilling_table,
    (DOCS / "memory.md", "measured"): recall_table,
}


def filled(text: str, mark: str, content: str) -> str:
    """A page with `content` between the two marks of that name."""
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    head, rest = text.split(begin)
    return f"{head}{begin}\n{content}\n{end}{rest.split(end)[1]}"


def main() -> None:
    for (page, mark), make in TABLES.items():
        page.write_text(filled(page.read_text(encoding="utf-8"), mark, make()), encoding="utf-8")
        print(f"{page.name}: {mark}\n{make()}\n")


if __name__ == "__main__":
    main()
