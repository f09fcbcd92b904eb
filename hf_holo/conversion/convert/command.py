"""`hf-holo convert`: a language model becomes holographic, with a report of what that cost.

    hf-holo convert TEACHER OUT --ratio 0.8 --train_file a.txt b.txt   linear layers, fitted to texts
    hf-holo convert TEACHER OUT --quantize int8 --train_file a.txt     the same, then stored in 8 bits a value
    hf-holo convert TEACHER OUT --to hsn --layers 0 1                  attention, to be distilled
    hf-holo convert TEACHER --dry-run

TEACHER is a causal or masked language model of transformers with its tokenizer; a dry run needs its config alone. OUT
loads with plain `from_pretrained`. A run that was stopped continues when the same command is given again.

Memory: the weights in the type that they are stored in, the activations of one window with their gradients, and for
linear layers the statistics of as many layers as --memory allows (the others are on disk, in OUT.work), for attention
the student.
"""

import hashlib
import math
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ...data.windows import fingerprint
from ...distributed.processes import PATIENCE, by_main, failing_together, is_main, launched
from ...errors import HoloError, first_line
from ...generate import generate_text
from ...hub.code import add_code
from ...modeling.checkpoint import weight_files
from ...modeling.integers import BITS
from ..sources import Source, Text, calibration_texts, load_tokenizer, mixed
from ..surgery.quantize import quantize_linears
from ..work_folder import WorkFolder, check_out, clear_disk_errors, work_path
from .arguments import ConvertArguments, parse
from .conversion import Conversion
from .linears import CalibratedSurgery, RegeneratedSurgery
from .mixers import MixerTransfer
from .report import Outcome, Score, print_scores, write_report

WEIGHT_FILES = ("*.safetensors", "*.bin")


def main(argv: list[str]) -> None:
    """Run `hf-holo convert` with these arguments.

    Raises:
        HoloError: bad input; the message is one line that says what to do.
    """
    command = parse(argv, __doc__)
    teacher = command.teacher
    if launched():
        PartialState(cpu=True, timeout=PATIENCE)  # a conversion runs on the CPU, and so do its messages
    if command.dry_run:
        source = Source.find(teacher, command.options.trust_remote_code)
        by_main(lambda: choose_conversion(source, command.options).print_coverage())
        return
    out = cast(Path, command.out)  # parse() lets only a dry run go without
    try:
        outcome = convert(teacher, out, command.options, command.overwrite)
    except KeyboardInterrupt:
        place = work_path(out)
        PartialState().print(f"\nInterrupted. What is done is saved in {place}; the same command resumes from there.")
        raise SystemExit(130) from None
    if is_main():
        print_scores(outcome)
        print(f"The model is saved in {out}, with report.json, layers.csv and README.md; load it with from_pretrained.")
        print(outcome.next_step(teacher, str(out)))


def choose_conversion(source: Source, options: ConvertArguments) -> Conversion:
    """The conversion that the options name.

    Raises:
        HoloError: it does not fit the teacher.
    """
    if options.to == "hsn":
        return MixerTransfer(source, options)
    return (CalibratedSurgery if options.calibrated else RegeneratedSurgery)(source, options)


@dataclass(frozen=True)
class Job:
    """Everything that a conversion needs except the weights.

    Attributes:
        source: the teacher.
        options: of the command.
        conversion: what happens to the model.
        tokenizer: of the teacher; None only where no text is read.
        texts: in windows.
    """

    source: Source
    options: ConvertArguments
    conversion: Conversion
    tokenizer: PreTrainedTokenizerBase | None
    texts: list[Text]

    @property
    def identity(self) -> dict[str, Any]:
        """What unfinished work depends on."""
        weights = sorted(path for pattern in WEIGHT_FILES for path in Path(self.source.name).glob(pattern))
        return {
            "recipe": self.options.recipe,
            "teacher": self.source.name,
            "weights": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in weights},
            "texts": [
                [hashlib.sha256(text.calibration.numpy().tobytes()).hexdigest(), fingerprint(text.held_out)]
                for text in self.texts
            ],
        }


def convert(teacher: str, out: Path, options: ConvertArguments, overwrite: bool = False) -> Outcome:
    """Convert as `options` say; the folder `out` appears at the end, complete.

    Args:
        teacher: folder or Hub name of the model.
        out: folder of the result; the work in progress is kept next to it.
        options: checked already.
        overwrite: replace an earlier result.

    Raises:
        HoloError: bad input, or a full disk. The teacher and an earlier `out` are then as they were.
    """
    seconds: dict[str, float] = {}
    with timed(seconds, "total"):
        with failing_together():
            check_out(out, overwrite)
            job = prepare(teacher, out, options)
        conversion = job.conversion
        with clear_disk_errors("OUT", work_path(out)):
            work = by_main(lambda: begin_work(out, job, overwrite))
            model = job.source.load()
            with timed(seconds, "calibration"):
                conversion.measure(model, job.texts, work)
            with timed(seconds, "teacher"):
                before = judge(model, job, work, "teacher")
            with timed(seconds, "surgery"):
                model = conversion.apply(model, job.texts, work)
                stored = stored_values(model)
                if options.integers:
                    windows = mixed(job.texts)[: options.fisher_tokens // options.block_size]
                    quantize_linears(model, options.integers, windows)
            with timed(seconds, "student"):
                after = judge(model, job, work, "student")
            result = by_main(lambda: save_model(model, job, work))
    outcome = by_main(lambda: describe(job, out, result, stored, (before, after), seconds))
    with clear_disk_errors("OUT", work_path(out)):
        by_main(lambda: publish(conversion, work, result, outcome))
    return outcome


def begin_work(out: Path, job: Job, overwrite: bool) -> WorkFolder:
    """The work folder, made or found.

    Raises:
        HoloError: it cannot be used, or the disk has no room for what will be in it.
    """
    work = WorkFolder(out, job.identity, overwrite)
    check_space(work, job.conversion.disk)
    return work


def save_model(model: PreTrainedModel, job: Job, work: WorkFolder) -> Path:
    """The folder of the result, with the model and its tokenizer.

    Raises:
        HoloError: what was saved would not load.
    """
    result, trust = work.new_result(), job.options.trust_remote_code
    model.save_pretrained(result)
    if not trust:
        add_code(result)
    check_loading(model, result, trust)
    if job.tokenizer is not None:
        job.tokenizer.save_pretrained(result)
    return result


def describe(
    job: Job,
    out: Path,
    result: Path,
    stored: dict[str, int],
    judged: tuple["Judgement", "Judgement"],
    seconds: dict[str, float],
) -> Outcome:
    """What the report says.

    Args:
        job: that is done.
        out, result: the folder of the result, and where it is now.
        stored: how many values it holds, see [`stored_values`].
        judged: teacher and student.
        seconds: that the parts of the conversion took.
    """
    conversion, (before, after) = job.conversion, judged
    figures, integers = conversion.figures(stored), job.options.integers
    size = sum(path.stat().st_size for path in weight_files(result))
    return Outcome(
        name=out.name,
        teacher=job.source.name,
        auto_class=job.source.auto_class.__name__,
        recipe=job.options.recipe,
        figures={**figures, "bytes_on_disk": size, "quantize": job.options.quantize},
        summary=conversion.summary(figures) + in_integers(integers, size),
        lesson=conversion.lesson if job.source.causal and not integers else None,
        advice=conversion.advice,
        numbers={"teacher": conversion.twin.num_parameters(), "student": sum(stored.values())},
        before=before.scores,
        after=after.scores,
        samples={"teacher": before.sample, "student": after.sample} if before.sample else {},
        seconds=seconds,
        peak_memory_gib=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    )


def publish(conversion: Conversion, work: WorkFolder, result: Path, outcome: Outcome) -> None:
    """Write the report, and give the result its name."""
    conversion.write_layers(result)
    write_report(result, outcome)
    work.publish()


def stored_values(model: PreTrainedModel) -> dict[str, int]:
    """How many values a checkpoint of the model holds, by key; what is tied counts once."""
    counts: dict[str, int] = {}
    seen: set[tuple[Any, ...]] = set()
    for key, x in model.state_dict().items():
        place = (x.data_ptr(), x.shape)
        if place not in seen or not x.numel():
            seen.add(place)
            counts[key] = x.numel()
    return counts


def in_integers(kind: str | None, size: int) -> str:
    """What the summary says of a checkpoint of `size` bytes with layers in small integers."""
    return f"; linear layers in {kind}, {BITS[kind]} bits a value, {size / 1e6:,.1f} MB on disk" if kind else ""


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
        raise HoloError(f"OUT: {str(out)!r} is the teacher, or is inside it; name another folder")
    trust = options.trust_remote_code
    source = Source.find(teacher, trust)
    conversion = choose_conversion(source, options)
    try:
        tokenizer = load_tokenizer(teacher, trust_remote_code=trust)
    except HoloError:
        if options.calibrated or options.train_file:
            raise
        tokenizer = None
    return Job(source, options, conversion, tokenizer, calibration_texts(options, tokenizer, source))


def check_space(work: WorkFolder, needed: int) -> None:
    """Raises HoloError if the disk has no room for `needed` bytes."""
    free = shutil.disk_usage(work.path).free
    if free < needed:
        raise HoloError(
            f"OUT: there are {free / 2**30:.1f} GiB of free disk space at {str(work.path)!r}, "
            f"but up to {needed / 2**30:.1f} GiB are needed"
        )


def check_loading(model: PreTrainedModel, folder: Path, trust_remote_code: bool) -> None:
    """Raises HoloError if what was saved does not load, without memory, on the meta device."""
    try:
        _, found = type(model).from_pretrained(
            folder, device_map="meta", output_loading_info=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise HoloError(f"OUT: what was saved would not load: {type(error).__name__}: {first_line(error)}") from error
    if found["missing_keys"]:
        raise HoloError(f"OUT: what was saved lacks {sorted(found['missing_keys'])[0]!r}")


# Judgement ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judgement:
    """Scores on all texts, and a sample (empty for a masked language model)."""

    scores: list[Score]
    sample: str


def judge(model: PreTrainedModel, job: Job, work: WorkFolder, who: str) -> Judgement:
    """Measure the model on the held-out windows and let it write; what was measured before is read again.

    Processes of one run share the windows; the main one lets the model write.
    """
    known = by_main(lambda: work.load_json(who))
    if known is None:
        scores = [
            Score(text.name, len(text.held_out), text.perplexity(model, f"perplexity of the {who}"))
            for text in job.texts
        ]
        can_write = job.texts and model.can_generate() and all(math.isfinite(score.perplexity) for score in scores)
        sample = by_main(lambda: write(model, job) if can_write else "")
        known = {"scores": [asdict(score) for score in scores], "sample": sample}
        by_main(lambda: work.save_json(who, known))
    return Judgement([Score(**score) for score in known["scores"]], known["sample"])


def write(model: PreTrainedModel, job: Job) -> str:
    """A sample of the model."""
    options = job.options
    prompt = job.texts[0].prompt if options.sample_prompt is None else options.sample_prompt
    set_seed(options.seed)
    tokenizer = cast(PreTrainedTokenizerBase, job.tokenizer)  # there is one where there are texts
    return generate_text(model, tokenizer, prompt, options.sample_tokens)
