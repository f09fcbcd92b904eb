"""`hf-holo convert`: the linear layers of a language model become holographic, with a report of what that cost.

    hf-holo convert TEACHER OUT --ratio 0.8 --text a.txt b.txt
    hf-holo convert TEACHER --dry-run

TEACHER is a causal or masked language model of transformers with its tokenizer; a dry run needs its config alone. OUT
loads with plain `from_pretrained`. A run that was stopped goes on when the same command is given again.

Memory: the weights in the type that they are stored in, the statistics of as many layers as --memory allows, and the
activations of one window with their gradients. The statistics of the others lie on disk, in OUT.work.
"""

import hashlib
import math
import resource
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import HoloError
from .calibration import (
    Factors,
    Site,
    Statistics,
    allocate,
    collect,
    factorise,
    find_sites,
    install,
    stacked_weight,
    statistics_bytes,
    surgery_plan,
)
from .convert_arguments import ConvertArguments, parse
from .convert_report import LayerRow, Outcome, Score, print_coverage, print_scores, write_report
from .evaluation import numbers_on_disk, perplexity, sample
from .sources import Source, Text, load_texts, load_tokenizer, mixed
from .surgery import HoloSurgeryConfig, apply_surgery, choose, plan
from .work_folder import WorkFolder, check_out, clear_disk_errors, work_path

PROMPT_TOKENS = 32  # of the held-out text, to begin the sample with
WEIGHT_FILES = ("*.safetensors", "*.bin")


def main(argv: list[str]) -> None:
    """Run `hf-holo convert` with these arguments.

    Raises:
        HoloError: bad input; the message is one line that says what to do.
    """
    command = parse(argv, __doc__)
    if command.dry_run:
        dry_run(command.teacher, command.options)
        return
    try:
        print_scores(convert(command.teacher, command.out, command.options, command.overwrite))
    except KeyboardInterrupt:
        print(f"\nInterrupted. What is measured lies in {work_path(command.out)}; the same command goes on from there.")
        raise SystemExit(130) from None
    print(
        f"The model lies in {command.out}, with report.json, layers.csv and README.md; it loads with from_pretrained."
    )


def dry_run(teacher: str, options: ConvertArguments) -> None:
    """Print what would become of every module, without reading any weights.

    A calibrated conversion will move harmonics between the layers; the table gives all the same share.
    """
    source, surgery = Source.find(teacher), options.surgery()
    twin = source.without_weights()
    if options.calibrated:
        sites = find_sites(twin, surgery)
        surgery.layers = surgery_plan(sites, [site.largest_rank(options.ratio) or 1 for site in sites])
    else:
        surgery.layers = plan(twin, surgery)
    print_coverage(apply_surgery(twin, surgery), surgery.layers)


@dataclass(frozen=True)
class Job:
    """Everything that a conversion needs except the weights.

    Attributes:
        source: the teacher.
        options: of the command.
        surgery: the choice of layers.
        dense: numbers of each chosen layer, by name, biases included.
        sites: of a calibrated conversion, else empty.
        numbers: of the whole teacher; `size` in bytes.
        tokenizer: of the teacher; None only where no text is read.
        texts: in windows.
    """

    source: Source
    options: ConvertArguments
    surgery: HoloSurgeryConfig
    dense: dict[str, int]
    sites: list[Site]
    numbers: int
    size: int
    tokenizer: PreTrainedTokenizerBase | None
    texts: list[Text]

    @property
    def identity(self) -> dict[str, Any]:
        """What unfinished work depends on."""
        weights = sorted(path for pattern in WEIGHT_FILES for path in Path(self.source.name).glob(pattern))
        windows = [(text.calibration, text.held_out.inputs) for text in self.texts]
        return {
            "recipe": self.options.recipe,
            "teacher": self.source.name,
            "weights": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in weights},
            "texts": [hashlib.sha256(torch.cat(pair).numpy().tobytes()).hexdigest() for pair in windows],
        }


def convert(teacher: str, out: Path, options: ConvertArguments, overwrite: bool = False) -> Outcome:
    """Convert as `options` say; the folder `out` appears at the end, complete.

    Args:
        teacher: folder or Hub name of the model.
        out: folder of the result; the work in progress lies beside it.
        options: checked already.
        overwrite: replace an earlier result.

    Raises:
        HoloError: bad input, or a full disk. The teacher and an earlier `out` are then as they were.
    """
    seconds: dict[str, float] = {}
    with timed(seconds, "total"):
        check_out(out, overwrite)
        job = prepare(teacher, out, options)
        with clear_disk_errors(out):
            work = WorkFolder(out, job.identity, overwrite)
            check_space(work, job)
            model = job.source.load()
            if options.calibrated:
                with timed(seconds, "calibration"):
                    measure(model, job, work)
            with timed(seconds, "teacher"):
                before = judge(model, job, work, "teacher")
            with timed(seconds, "surgery"):
                rows = calibrated(model, job, work) if options.calibrated else regenerated(model, job.surgery)
            with timed(seconds, "student"):
                after = judge(model, job, work, "student")
            result = work.new_result()
            model.save_pretrained(result)
            if job.tokenizer is not None:
                job.tokenizer.save_pretrained(result)
    outcome = Outcome(
        name=out.name,
        teacher=teacher,
        auto_class=job.source.auto_class.__name__,
        recipe=options.recipe,
        kept=numbers_on_disk(result, job.dense) / sum(job.dense.values()),
        numbers={"teacher": job.numbers, "student": numbers_on_disk(result)},
        before=before.scores,
        after=after.scores,
        samples={"teacher": before.sample, "student": after.sample} if before.sample else {},
        rows=rows,
        seconds=seconds,
        peak_memory_gib=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    )
    with clear_disk_errors(out):
        write_report(result, outcome)
        work.publish()
    return outcome


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Put the duration of this part into `seconds`."""
    start = time.perf_counter()
    yield
    seconds[part] = round(time.perf_counter() - start, 1)


def prepare(teacher: str, out: Path, options: ConvertArguments) -> Job:
    """Read and check everything but the weights.

    Raises:
        HoloError: bad input.
    """
    if Path(teacher).resolve() in (out.resolve(), *out.resolve().parents):
        raise HoloError(f"OUT: {str(out)!r} is the teacher, or lies in it; name another folder")
    source, surgery = Source.find(teacher), options.surgery()
    twin = source.without_weights()
    dense = {name: sum(p.numel() for p in twin.get_submodule(name).parameters()) for name in choose(twin, surgery)}
    sites = find_sites(twin, surgery) if options.calibrated else []
    if sites:  # whether the ratio can be reached does not depend on what will be measured
        allocate(sites, [torch.ones(site.size) for site in sites], options.ratio)
    tokenizer = load_tokenizer(teacher, needed=options.calibrated or bool(options.text))
    texts = load_texts(options, tokenizer, source)
    size = sum(p.numel() * p.itemsize for p in twin.parameters())
    return Job(source, options, surgery, dense, sites, twin.num_parameters(), size, tokenizer, texts)


def check_space(work: WorkFolder, job: Job) -> None:
    """Raises HoloError if the disk has no room for the work and the result."""
    needed = job.size + 4 * sum(2 * site.size**2 for site in job.sites)
    free = shutil.disk_usage(work.path).free
    if free < needed:
        raise HoloError(
            f"OUT: there are {free / 2**30:.1f} GiB of free disk at {str(work.path)!r}, "
            f"but up to {needed / 2**30:.1f} GiB are needed"
        )


# Conversion ---------------------------------------------------------------------------------------------------------


def measure(model: PreTrainedModel, job: Job, work: WorkFolder) -> None:
    """Bring the factors of all sites into the work folder, as far as they are not there yet.

    At no time is more in memory than the model, the statistics of some sites (`options.memory`) and the factors of one.
    """
    options, windows = job.options, mixed(job.texts)
    fisher_windows = windows[: options.fisher_tokens // options.window]
    for batch in portions(job.sites, options.memory * 2**30):
        unknown = [n for n in batch if not work.has_tensors(_factors(n)) and not work.has_tensors(_statistics(n))]
        if unknown:
            sites = [job.sites[number] for number in unknown]
            measured = collect(model, sites, windows, fisher_windows, options.seed)
            for number, statistics in zip(unknown, measured, strict=True):
                work.save_tensors(_statistics(number), asdict(statistics))
            del measured, statistics
        for number in tqdm(batch, desc="factors", unit="site"):
            if not work.has_tensors(_factors(number)):
                factorise_into(work, model, job.sites[number], number)
            work.drop_tensors(_statistics(number))


def factorise_into(work: WorkFolder, model: PreTrainedModel, site: Site, number: int) -> None:
    """The factors of one site, from its statistics."""
    weight = stacked_weight(model, site)
    factors = factorise(site, weight, Statistics(**work.load_tensors(_statistics(number))))
    precision = torch.promote_types(weight.dtype, torch.float32)
    work.save_tensors(_factors(number), {name: tensor.to(precision) for name, tensor in asdict(factors).items()})


def portions(sites: Sequence[Site], memory: float) -> Iterator[list[int]]:
    """Numbers of consecutive sites whose statistics fit into `memory` bytes; at least one at a time."""
    batch: list[int] = []
    taken = 0
    for number, site in enumerate(sites):
        if batch and taken + statistics_bytes(site) > memory:
            yield batch
            batch, taken = [], 0
        batch.append(number)
        taken += statistics_bytes(site)
    yield batch


def _factors(number: int) -> str:
    return f"factors-{number:04d}"


def _statistics(number: int) -> str:
    return f"statistics-{number:04d}"


def calibrated(model: PreTrainedModel, job: Job, work: WorkFolder) -> list[LayerRow]:
    """Choose the ranks and convert, in place, with the factors in the work folder."""
    losses = [work.load_tensors(_factors(number), "loss")["loss"] for number in range(len(job.sites))]
    ranks = allocate(job.sites, losses, job.options.ratio)
    rows = []
    for number, (site, rank) in enumerate(zip(tqdm(job.sites, desc="surgery", unit="site"), ranks, strict=True)):
        factors = Factors(**work.load_tensors(_factors(number)))
        if rank is not None:
            install(model, site, factors, rank)
        rows.append(LayerRow(site.layers, rank, site.size, site.numbers, site.stored(rank), factors.error(rank)))
    job.surgery.layers = surgery_plan(job.sites, ranks)
    model.config.quantization_config = job.surgery
    return rows


def regenerated(model: PreTrainedModel, surgery: HoloSurgeryConfig) -> list[LayerRow]:
    """The original's surgery, in place."""
    apply_surgery(model, surgery)
    rows = []
    for name, entry in model.config.quantization_config.layers.items():
        layer = model.get_submodule(name)
        numbers = layer.count_numbers()
        rows.append(LayerRow((name,), entry["harmonics"], layer.in_features, numbers["dense"], numbers["stored"], None))
    return rows


# Judgement ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judgement:
    """Scores on all texts, and a sample (empty for a masked language model)."""

    scores: list[Score]
    sample: str


def judge(model: PreTrainedModel, job: Job, work: WorkFolder, who: str) -> Judgement:
    """Measure the model on the held-out windows and let it write; what was measured before is read again."""
    known = work.load_json(who)
    if known is None:
        scores = [
            Score(text.name, len(text.held_out), perplexity(model, text.held_out, f"perplexity of the {who}"))
            for text in job.texts
        ]
        can_write = job.texts and model.can_generate() and all(math.isfinite(score.perplexity) for score in scores)
        known = {"scores": [asdict(score) for score in scores], "sample": write(model, job) if can_write else ""}
        work.save_json(who, known)
    return Judgement([Score(**score) for score in known["scores"]], known["sample"])


def write(model: PreTrainedModel, job: Job) -> str:
    """A sample of the model."""
    prompt = job.options.prompt
    if prompt is None:
        prompt = job.tokenizer.decode(job.texts[0].held_out.inputs[0, :PROMPT_TOKENS])
    return sample(model, job.tokenizer, prompt, job.options.sample_tokens, job.options.seed)
