"""The options of `hf-holo convert`, from a YAML recipe and the command line."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from ...errors import HoloError
from ...modeling.integers import KINDS
from ...recipes import RecipeParser, add_recipe, described, given_words, load_recipe, suggestion, words_of_today
from ..surgery.plan import HoloSurgeryConfig

PREFIX = "convert-"  # of the recipes in the package
RATIO = 0.8  # of a calibrated conversion
OLD_NAMES = {"text": "train_file", "held_out": "validation_fraction", "window": "block_size", "prompt": "sample_prompt"}

# What says nothing about the other kind of conversion.
OF_LINEAR_LAYERS = (
    *("method", "ratio", "harmonics", "basis", "modules", "exclude", "keep_first", "keep_last"),
    *("tokens", "fisher_tokens", "refit", "memory", "quantize"),
)
OF_MIXERS = ("layers",)


@dataclass
class ConvertArguments:
    """What to convert, and how: the options, which are also the keys of a recipe."""

    to: Literal["holo", "hsn"] = described(
        "holo: linear layers become holographic, the model stays what it is; hsn: attention becomes holographic "
        "mixers, the model a HoloSpectralNet that has to be distilled.",
        "holo",
    )
    layers: list[int] = field(
        default_factory=list,
        metadata={"help": "With hsn: the layers that get a mixer, negative ones from the end; default: all."},
    )
    method: Literal["calibrated", "harmonic"] | None = described(
        "calibrated: fitted to the text, useful at once; harmonic: regenerated bases, to be trained; "
        "default: calibrated."
    )
    ratio: float | None = described(
        f"Share of the converted layers' values that stays on disk, bases included; calibrated: default {RATIO}."
    )
    harmonics: int | None = described("With harmonic: harmonics of every layer instead of a ratio; default 64.")
    basis: Literal["random", "dct", "golden"] = described("With harmonic: the basis.", "random")
    modules: list[str] = field(
        default_factory=list, metadata={"help": "Regular expressions of the layers to convert; default: all in blocks."}
    )
    exclude: list[str] = field(default_factory=list, metadata={"help": "Regular expressions of layers that stay."})
    keep_first: int = described("Blocks at the start that stay.", 0)
    keep_last: int = described("Blocks at the end that stay.", 0)
    train_file: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Texts to calibrate on, mixed in equal parts, and to measure on: files, folders, `python-help` or "
            "Hub data sets."
        },
    )
    validation_fraction: list[float] = field(
        default_factory=lambda: [0.1],
        metadata={"help": "Share at the end of each text that is held out; one for all, or one for each."},
    )
    block_size: int = described("Tokens in a window of text.", 512)
    tokens: int = described("Calibration tokens for the activations.", 65536)
    fisher_tokens: int = described("How many of them for the gradients too.", 16384)
    refit: bool | None = described(
        "With calibrated: fit every block again to the inputs that the student itself produces; default: if there are "
        "ten tokens of text for each input of the widest layer."
    )
    quantize: Literal["none", "int8", "int4"] = described(
        "With calibrated: what linear layers are stored in after the surgery, for inference; training comes before.",
        "none",
    )
    eval_windows: int = described("Held-out windows of each text to measure perplexity on; 0: all.", 32)
    memory: float = described("GiB that the statistics may take at a time; with less the text is read more often.", 4.0)
    sample_prompt: str | None = described("Start of the sample; default: the start of the first held-out text.")
    sample_tokens: int = described("Tokens to write for the sample.", 80)
    trust_remote_code: bool = described("Run the code that the teacher brings with its weights.", False)
    seed: int = described("Of windows, labels, bases, fresh weights and the sample.", 0)

    @property
    def calibrated(self) -> bool:
        return self.to == "holo" and self.method != "harmonic"

    @property
    def integers(self) -> str | None:
        """The small integers that are wanted, "int8" or "int4"; None for none."""
        return self.quantize if self.quantize in KINDS else None

    @property
    def recipe(self) -> dict[str, Any]:
        """What is not at its default."""
        defaults = ConvertArguments()
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value != getattr(defaults, name)}

    @property
    def validation_shares(self) -> list[float]:
        """One for each text."""
        shares = self.validation_fraction
        return shares * len(self.train_file) if len(shares) == 1 else shares

    def surgery(self) -> HoloSurgeryConfig:
        """The choice of layers as the surgery understands it."""
        choice: dict[str, Any] = {
            "modules": self.modules or None,
            "exclude": self.exclude or None,
            "keep_first": self.keep_first,
            "keep_last": self.keep_last,
            "ratio": self.ratio,
            "seed": self.seed,
        }
        if self.calibrated:
            return HoloSurgeryConfig(**choice, basis="data", shared=True, folded=True, pivoted=True)
        return HoloSurgeryConfig(**choice, harmonics=self.harmonics, basis=self.basis)

    def check(self) -> None:
        """Fill in the method and its ratio.

        Raises:
            HoloError: a value is out of range, or options exclude each other.
        """
        foreign, remedy = {
            "holo": (OF_MIXERS, "linear layers are chosen with --modules, --exclude, --keep_first and --keep_last"),
            "hsn": (OF_LINEAR_LAYERS, "attention is chosen with --layers"),
        }[self.to]
        for name in foreign:
            if name in self.recipe:
                raise HoloError(f"{name}: {getattr(self, name)!r} has no meaning with --to {self.to}: {remedy}")
        if self.to == "holo":
            self._check_surgery()
        if self.block_size < 2:
            raise HoloError(f"block_size: {self.block_size} is too small; at least 2 tokens")
        if self.eval_windows < 0:
            raise HoloError(f"eval_windows: {self.eval_windows} is negative; a number of windows, or 0 for all")
        if self.sample_tokens < 1:
            raise HoloError(f"sample_tokens: {self.sample_tokens} is too small; at least 1")
        if self.train_file and len(self.validation_shares) != len(self.train_file):
            raise HoloError(
                f"validation_fraction: {len(self.validation_fraction)} shares for {len(self.train_file)} texts; "
                "give one, or one each"
            )
        for share in self.validation_fraction:
            if not 0 < share < 1:
                raise HoloError(f"validation_fraction: {share} is not between 0 and 1")

    def _check_surgery(self) -> None:
        self.method = self.method or "calibrated"
        if self.calibrated:
            self.ratio = RATIO if self.ratio is None else self.ratio
            if self.harmonics is not None:
                raise HoloError(
                    f"harmonics: {self.harmonics} is chosen by the calibration itself; give --ratio instead"
                )
            if not 0 < self.ratio < 1:
                raise HoloError(f"ratio: {self.ratio} is not between 0 and 1")
        elif self.integers:
            raise HoloError(
                f"quantize: {self.quantize!r} needs the calibrated method: layers in regenerated bases have to be "
                "trained, and integers cannot be; train them first, then call quantize_linears"
            )
        elif self.refit:
            raise HoloError("refit: True needs the calibrated method, which fits layers to a text")
        for name in ("tokens", "fisher_tokens"):
            if getattr(self, name) < self.block_size:
                raise HoloError(f"{name}: {getattr(self, name)} is too small; at least block_size={self.block_size}")
        if self.fisher_tokens > self.tokens:
            raise HoloError(f"fisher_tokens: {self.fisher_tokens} is too large; at most tokens={self.tokens}")
        if self.memory <= 0:
            raise HoloError(f"memory: {self.memory} is not positive; more than 0 GiB")
        self.surgery()


@dataclass
class Command:
    """One call: `out` is None only in a dry run."""

    teacher: str
    out: Path | None
    overwrite: bool
    dry_run: bool
    options: ConvertArguments


def parse(argv: list[str], description: str) -> Command:
    """Parse the command line on top of the recipe that it may name.

    Raises:
        HoloError: an unknown or malformed option or recipe, or a value out of range.
    """
    parser = RecipeParser(
        ConvertArguments,
        prog="hf-holo convert",
        description=description,
        usage="%(prog)s TEACHER [OUT] [RECIPE] [--OPTION VALUE ...]",
        allow_abbrev=False,
    )
    parser.add_argument("teacher", metavar="TEACHER", help="folder or Hub name of the model")
    parser.add_argument("out", metavar="OUT", nargs="?", type=Path, help="folder of the result")
    add_recipe(parser, __package__, PREFIX)
    parser.add_argument(
        "--overwrite", action="store_true", help="Replace an earlier conversion when this one is ready."
    )
    parser.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="Only show what would become of every module."
    )
    argv = words_of_today(argv, OLD_NAMES)
    recipe = given_words(parser, argv).get("recipe")
    if recipe:
        reader = RecipeParser(ConvertArguments, allow_abbrev=False)
        parser.set_defaults(**vars(reader.parse_args(_as_words(recipe))))
    values = vars(parser.parse_args(argv))
    del values["recipe"]
    command = {name: values.pop(name) for name in ("teacher", "out", "overwrite", "dry_run")}
    options = ConvertArguments(**values)
    options.check()
    if command["out"] is None and not command["dry_run"]:
        raise HoloError("OUT: name a folder for the result, or give --dry-run")
    return Command(**command, options=options)


def _as_words(recipe: str) -> list[str]:
    """A recipe as words of a command line, so that its values meet the same checks.

    Raises:
        HoloError: there is no such recipe, or it sets what is not an option.
    """
    options = [f.name for f in fields(ConvertArguments)]
    words: list[str] = []
    for name, value in load_recipe(recipe, __package__, PREFIX, OLD_NAMES).items():
        if name not in options:
            raise HoloError(f"recipe: {recipe!r} sets the unknown option {name!r}{suggestion(name, options)}")
        words += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    return words
