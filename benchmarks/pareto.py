"""What a byte buys: perplexity, memory and speed of one model at 16, 8 and 4 bits, whole and after layer surgery.

    python benchmarks/pareto.py MODEL --text wikitext2-valid.txt tinyshakespeare.txt --held_out 0.5 0.1

MODEL is the folder of a causal language model with its tokenizer. Every point is the model in one form: in float32 and
bfloat16, its linear layers in 8 and 4 bits (by torchao where that is installed; by the storage of this package), and
converted by surgery to several shares of their values, at 16, 8 and 4 bits. All but the first keep what is not in
integers in bfloat16, and compute in it. A point is loaded in a process of its own for its memory and its scores; the
times of all are then measured in turns, in one process. On the frontier is a point that no other beats in perplexity
without more bytes.

With `--students` the converted models are kept, and those that are there already are used again, those of surgery.py
too. Points that the result file holds already are not measured again. The seconds are those of what the run itself did.
"""

import argparse
import copy
import gc
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import surgery
import torch
from common.own_process import in_own_process
from common.report import (
    RESULTS,
    earlier_rows,
    image_path,
    interleaved_medians,
    markdown_table,
    measured_on,
    print_footer,
    print_table,
    write_report,
)
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_holo import quantize_linears
from hf_holo.conversion.convert.arguments import ConvertArguments
from hf_holo.conversion.sources import Source, Text, calibration_texts, load_tokenizer, mixed
from hf_holo.conversion.surgery.calibration import collect, find_sites
from hf_holo.files import replacing, write_csv
from hf_holo.modeling.checkpoint import weight_files
from hf_holo.modeling.integers import KINDS

TORCHAO = "int8 by torchao"
WHOLE = ("float32", "bfloat16", TORCHAO, *KINDS)  # forms of the model itself
THIN = ("bfloat16", *KINDS)  # forms of it after surgery
HEARD = 64  # tokens before the one that is timed
TOP = 3.0  # times the teacher's perplexity that the picture shows


class Point(NamedTuple):
    """The model with this share of the values of its linear layers (1: no surgery), stored in this form."""

    kept: float
    form: str

    @property
    def name(self) -> str:
        return f"{'no surgery' if self.kept == 1 else f'surgery {self.kept:.0%}'}, {self.form}"

    @property
    def short(self) -> str:
        """In the picture, where colours tell the form."""
        return self.form if self.kept == 1 else f"{self.kept:.0%}"


# Models --------------------------------------------------------------------------------------------------------------


def convert(args: argparse.Namespace, ratios: Sequence[float], model: PreTrainedModel, texts: list[Text]) -> None:
    """Save a student for each ratio, in float32; those that are there stay."""
    missing = [ratio for ratio in ratios if not weight_files(student_folder(args, ratio))]
    if not missing:
        return
    windows = mixed(texts)
    sites = find_sites(model, surgery.surgery_of("all", shared=True))
    statistics = collect(model, sites, windows, windows[: args.fisher_tokens // args.window], args.seed)
    factors = surgery.factors_of(model, sites, statistics)
    method = surgery.calibrated(sites, statistics, factors, windows if args.refit else None)
    for ratio in tqdm(missing, desc="surgery", unit="student"):
        student = copy.deepcopy(model)
        method(student, ratio)
        student.save_pretrained(student_folder(args, ratio))


def student_folder(args: argparse.Namespace, ratio: float) -> Path:
    """Where surgery.py keeps it, too."""
    method = surgery.CALIBRATED if args.refit else surgery.NOT_REFITTED
    return args.students / surgery.Trial(method, "all", ratio).folder


def folder_of(args: argparse.Namespace, point: Point) -> Path:
    """Of the model as the point stores it."""
    if point == Point(1, "float32"):
        return Path(args.model)
    return args.students / f"stored-{point.kept:.2f}-{'refit' if args.refit else 'fit'}-{point.form.replace(' ', '-')}"


def store(args: argparse.Namespace, point: Point, windows: torch.Tensor) -> None:
    """Save the model as the point stores it, unless it is there."""
    folder = folder_of(args, point)
    if weight_files(folder):
        return
    source = args.model if point.kept == 1 else student_folder(args, point.kept)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).eval()
    if point.form in KINDS:
        quantize_linears(model, point.form, windows)
    model.save_pretrained(folder)


def load(folder: str, form: str) -> PreTrainedModel:
    """The model, ready to compute."""
    dtype = torch.float32 if form == "float32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    if form == TORCHAO:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        head = model.get_output_embeddings()
        tied = head is not None and head.weight is model.get_input_embeddings().weight
        linears = {m for m in model.modules() if isinstance(m, torch.nn.Linear)} - ({head} if tied else set())
        quantize_(model, Int8WeightOnlyConfig(), lambda module, _: module in linears)
    return model


def bytes_of(model: PreTrainedModel, folder: Path, form: str) -> int:
    """On the disk; of torchao's tensors, which not every version of transformers can save, those that they hold."""
    if form != TORCHAO:
        return sum(path.stat().st_size for path in weight_files(folder))
    unique = {id(p): p for p in [*model.parameters(), *model.buffers()]}
    return sum(_held(p.data) for p in unique.values())


def _held(tensor: torch.Tensor) -> int:
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
    return sum(_held(getattr(tensor, name)) for name in names) if names else tensor.nbytes


# Measurements --------------------------------------------------------------------------------------------------------


def texts_of(args: argparse.Namespace) -> list[Text]:
    sizes = {key: getattr(args, key) for key in ("tokens", "fisher_tokens", "eval_windows", "seed")}
    options = ConvertArguments(train_file=args.text, validation_fraction=args.held_out, block_size=args.window, **sizes)
    options.check()
    return calibration_texts(options, load_tokenizer(args.model), Source.find(args.model))


@torch.no_grad()
def score(point: Point, args: argparse.Namespace) -> dict[str, Any]:
    """Everything but the times, in a process of its own."""
    texts, folder = texts_of(args), folder_of(args, Point(1, "bfloat16") if point.form == TORCHAO else point)
    before = psutil.Process().memory_info().rss
    model = load(str(folder), point.form)
    decode, prefill = steps(model, args.prefill)
    for _ in range(2):
        prefill(), decode()
    gc.collect()
    figures: dict[str, Any] = {"point": point.name, "kept": point.kept, "form": point.form}
    figures |= {"bytes": bytes_of(model, folder, point.form)}
    figures |= {"resident_bytes": psutil.Process().memory_info().rss - before}
    figures |= {text.name: text.perplexity(model, f"{point.name}: {text.name}") for text in texts}
    if args.lambada:
        figures |= {"lambada": last_words(model, args)}
    return figures


def last_words(model: PreTrainedModel, args: argparse.Namespace) -> float:
    """Share of the passages of LAMBADA whose last word the model finds, token by token the most likely one."""
    tokenizer = load_tokenizer(args.model)
    lines = Path(args.lambada).read_text(encoding="utf-8").splitlines()
    count, right = min(args.passages, len(lines)), 0
    for number in range(count):
        passage = json.loads(lines[number * len(lines) // count])
        target = tokenizer(" " + passage["target"].strip(), add_special_tokens=False, return_tensors="pt").input_ids
        start = tokenizer(passage["context"].rstrip(), return_tensors="pt").input_ids
        logits = model(input_ids=torch.cat([start, target], 1)).logits[:, -1 - target.shape[1] : -1]
        right += bool((logits.argmax(-1) == target).all())
    return right / count


Step = Callable[[], object]


def steps(model: PreTrainedModel, prefill: int) -> tuple[Step, Step]:
    """One token after a short text, and a text of `prefill` tokens at once."""
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(vocabulary, (1, max(prefill, HEARD)), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        cache = model(input_ids=ids[:, :HEARD], use_cache=True).past_key_values

    @torch.no_grad()
    def decode() -> None:
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        cache.crop(HEARD)

    @torch.no_grad()
    def read() -> None:
        model(input_ids=ids[:, :prefill], use_cache=False, logits_to_keep=1)

    return decode, read


def times(points: Sequence[Point], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Tokens a second of every point, from medians of times that are taken in turns."""
    decodes, prefills = {}, {}
    for point in points:
        folder = folder_of(args, Point(1, "bfloat16") if point.form == TORCHAO else point)
        decodes[point.name], prefills[point.name] = steps(load(str(folder), point.form), args.prefill)
    decoding = interleaved_medians(decodes, args.repeats)
    reading = interleaved_medians(prefills, max(args.repeats // 5, 1), warmup=1)
    return [
        {"point": name, "decoded_per_second": 1 / decoding[name], "read_per_second": args.prefill / reading[name]}
        for name in decodes
    ]


# The run -------------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", nargs="?")
    parser.add_argument("--own_process", help=argparse.SUPPRESS)
    parser.add_argument("--text", nargs="+")
    parser.add_argument("--held_out", nargs="+", type=float, default=[0.1], help="share at the end of each text")
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.9, 0.8, 0.7, 0.6], help="of all linear layers")
    parser.add_argument("--refit", action="store_true", help="refit after the surgery, as hf-holo convert does")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--fisher_tokens", type=int, default=8192)
    parser.add_argument("--rounding_tokens", type=int, default=4096, help="that rounding to integers is fitted to")
    parser.add_argument("--eval_windows", type=int, default=8, help="of each text, evenly spaced; 0: all")
    parser.add_argument("--lambada", help="lambada.jsonl, with context and target in each line")
    parser.add_argument("--passages", type=int, default=40, help="of LAMBADA, evenly spaced")
    parser.add_argument("--prefill", type=int, default=128, help="tokens that are read at once")
    parser.add_argument("--repeats", type=int, default=15, help="timings of a token")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--students", type=Path, help="folder that keeps the converted models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if args.own_process:
        print(json.dumps(own_process(**json.loads(args.own_process))))
        return
    torch.set_num_threads(args.threads)
    start = time.perf_counter()
    points = points_of(args)
    settings = settings_of(args)
    rows, spent = earlier_rows("pareto", settings, args.results)
    speeds = earlier_rows("pareto", settings, args.results, "speeds")[0]
    with tempfile.TemporaryDirectory() as scratch:
        args.students = args.students or Path(scratch)
        done = {row["point"] for row in rows}
        if not {point.name for point in points} <= done or len(speeds) < len(points):
            texts = texts_of(args)
            windows = mixed(texts)
            convert(args, args.ratios, Source.find(args.model).load().float(), texts)
            for point in points:
                if point.form != TORCHAO:
                    store(args, point, windows[: max(args.rounding_tokens // args.window, 1)])

        def save() -> Path:
            figures = settings | {"rows": rows, "speeds": speeds}
            seconds = spent + time.perf_counter() - start
            return write_report("pareto", figures, seed=args.seed, seconds=seconds, folder=args.results)

        words = vars(args) | {"students": str(args.students), "results": str(args.results)}
        for point in points:
            if point.name not in done:
                rows.append(in_own_process(__file__, what="score", points=[point], words=words))
                print_table(rows[-1:])
                save()  # after every point: the whole takes long
        if len(speeds) < len(points):
            speeds[:] = in_own_process(__file__, what="times", points=points, words=words)
    path = save()
    joined = with_speeds({"figures": {"rows": rows, "speeds": speeds} | settings})
    write_csv(joined, args.results / "pareto.csv")
    draw(joined, image_path("pareto", args.results))
    print_table(joined)
    print_footer(path, spent + time.perf_counter() - start)


def own_process(what: str, points: list[Sequence], words: dict[str, Any]) -> Any:
    args = argparse.Namespace(**words | {"students": Path(words["students"])})
    torch.set_num_threads(args.threads)
    chosen = [Point(*point) for point in points]
    return score(chosen[0], args) if what == "score" else times(chosen, args)


def points_of(args: argparse.Namespace) -> list[Point]:
    """All points; that of torchao only where it is installed."""
    try:
        import torchao  # noqa: F401
    except ImportError:
        print("torchao is not installed: its point is left out")
        whole = [form for form in WHOLE if form != TORCHAO]
    else:
        whole = list(WHOLE)
    return [*(Point(1, form) for form in whole), *(Point(ratio, form) for ratio in args.ratios for form in THIN)]


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """What all points share."""
    source = Source.find(args.model)
    names = ("window", "tokens", "fisher_tokens", "rounding_tokens", "eval_windows", "held_out", "refit", "prefill")
    chosen = {name: getattr(args, name) for name in (*names, "threads", "passages")}
    parameters = source.without_weights().num_parameters()
    texts = [Path(text).name for text in args.text]
    return {"model": source.config.model_type, "parameters": parameters, "texts": texts, **chosen}


# What it means -------------------------------------------------------------------------------------------------------


def with_speeds(result: dict) -> list[dict[str, Any]]:
    """A row for every point: with its times, its perplexity relative to that in float32, whether it is on the frontier.
    Relative perplexity is the geometric mean over the texts."""
    f = result["figures"]
    speeds = {speed["point"]: speed for speed in f["speeds"]}
    teacher = f["rows"][0]
    rows = []
    for row in f["rows"]:
        ratios = [row[text] / teacher[text] for text in f["texts"]]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        rows.append({**row, **speeds.get(row["point"], {}), "relative_perplexity": mean})
    for row in rows:
        row["frontier"] = not any(_beats(other, row) for other in rows)
    return rows


def _beats(a: dict, b: dict) -> bool:
    """Whether a is no larger and no worse than b, and not equal in both."""
    mine, theirs = ((row["bytes"], row["relative_perplexity"]) for row in (a, b))
    return mine != theirs and all(x <= y for x, y in zip(mine, theirs, strict=True))


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity against bytes; what is far above is drawn at the top, with its value."""
    from matplotlib.figure import Figure  # slow to import

    colours = {
        "float32": "black",
        "bfloat16": "tab:blue",
        TORCHAO: "tab:purple",
        "int8": "tab:green",
        "int4": "tab:red",
    }
    figure = Figure(figsize=(9.5, 6), layout="constrained")
    axes = figure.subplots()
    edge = sorted((row for row in rows if row["frontier"]), key=lambda row: row["bytes"])
    heights = [min(row["relative_perplexity"], TOP) for row in edge]
    axes.plot([row["bytes"] / 1e6 for row in edge], heights, color="0.6", linewidth=1.5, zorder=1, label="frontier")
    for form in colours:
        for whole, marker, size in ((True, "*", 170), (False, "o", 45)):
            chosen = [row for row in rows if row["form"] == form and (row["kept"] == 1) == whole]
            where = [[row["bytes"] / 1e6 for row in chosen], [min(row["relative_perplexity"], TOP) for row in chosen]]
            label = f"{'whole model' if whole else 'after surgery'}, {form}"
            axes.scatter(*where, color=colours[form], marker=marker, s=size, zorder=3, label=label if chosen else None)
    for row in rows:
        point, high = Point(row["kept"], row["form"]), row["relative_perplexity"] > TOP
        label = f"{point.short} ↑ {row['relative_perplexity']:.3g}" if high else point.short
        place = (row["bytes"] / 1e6, min(row["relative_perplexity"], TOP))
        axes.annotate(label, place, xytext=(5, 6), textcoords="offset points", fontsize=8, rotation=30 if high else 0)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="weights on the disk (MB); further left is smaller",
        ylabel="perplexity ÷ that of the model in float32; lower is better",
        title="What a byte buys: percentages are the share of the linear layers' values that surgery keeps",
    )
    ticks = [1, 1.1, 1.2, 1.4, 1.7, 2, 2.5, 3]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_yticks([], minor=True)
    sizes = [size for size in (20, 30, 50, 70, 100, 150, 200, 300, 400, 600) if _near(size, rows)]
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def _near(size: float, rows: list[dict[str, Any]]) -> bool:
    sizes = [row["bytes"] / 1e6 for row in rows]
    return min(sizes) * 0.9 <= size <= max(sizes) * 1.1


def sentence(result: dict) -> str:
    f, rows = result["figures"], with_speeds(result)
    on = sorted((row for row in rows if row["frontier"]), key=lambda row: -row["bytes"])
    told = (f"{r['point']} ({r['bytes'] / 1e6:.0f} MB, {r['relative_perplexity']:.3g})" for r in on)
    thin = [row for row in rows if row["kept"] < 1]
    beaten = [row["point"] for row in thin if not row["frontier"]]
    most = f"surgery is not on it in {len(beaten)} of {len(thin)} points: {', '.join(beaten)}" if beaten else ""
    return (
        f"a {f['model']} of {f['parameters']:,} parameters at 16, 8 and 4 bits, whole and after surgery"
        f"{'' if f['refit'] else ' without refitting'}: on the frontier of bytes and perplexity (relative to float32, "
        f"mean over {' / '.join(f['texts'])}, {f['eval_windows']} windows each) are {'; '.join(told)}"
        f"{'; ' if most else ''}{most}; one seed"
    )


def table(result: dict) -> str:
    f = result["figures"]
    asked = any("lambada" in row for row in f["rows"])
    head = ["point", ">MB on disk", ">MB in memory", *(f">{text}" for text in f["texts"])]
    head += [*([">LAMBADA"] if asked else []), ">tokens/s, one at a time", ">tokens/s, read", "frontier"]
    rows = []
    for row in with_speeds(result):
        cells = [row["point"], f"{row['bytes'] / 1e6:.0f}", f"{row['resident_bytes'] / 1e6:.0f}"]
        cells += [f"{row[text]:.4g}" for text in f["texts"]]
        cells += [f"{row['lambada']:.0%}"] if asked else []
        cells += [f"{row.get(name, math.nan):.0f}" for name in ("decoded_per_second", "read_per_second")]
        rows.append((*cells, "yes" if row["frontier"] else ""))
    scored = (
        f"Perplexity on {f['eval_windows']} windows of {f['window']} tokens of each text, that nothing was fitted to"
    )
    passages = f"; {f['passages']} passages of LAMBADA" if asked else ""
    lines = [markdown_table(head, rows), "", f"{scored}{passages}; one seed."]
    lines.append(f"Reading: {f['prefill']} tokens at once. Measured on: {measured_on(result)}.")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
