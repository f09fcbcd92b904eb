"""Checks on models that see, hear, or have several senses, as far as they differ from those that read."""

from collections.abc import Iterator, Mapping
from itertools import combinations
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

from ...data.processors import new_processor
from ...data.tokenizers import character_tokenizer
from ...modeling.cache import RecurrentCache
from ...registry import architectures
from .checks import Violation, assert_same, check
from .quiet import quiet
from .subject import INPUTS, Subject, is_output, main_output

MASKS = {"pixel_values": ("pixel_mask",), "input_values": ("audio_attention_mask", "attention_mask")}
SEEN = 1e-3  # least change of the output, relative, of what is not ignored
PICTURES = ((1.0, 1.0), (1.0, 1.5), (0.6, 1.3), (2.2, 0.8))  # sides, relative to the size that the config names
SECONDS = (0.02, 0.11, 0.5, 1.7)
CUTTINGS = ((1.0,), (0.5, 0.5), (0.03, 0.4, 0.001, 0.2, 0.369), (0.1,) * 10)  # shares of a sound


def mask_name(subject: Subject, argument: str) -> str | None:
    """What the mask of an input is called."""
    return next((name for name in MASKS[argument] if name in subject.arguments), None)


# ---------------------------------------------------------------------------------------------- padding
@check("senses", "pixel_values", "pixel_mask")
def padding_of_pictures(subject: Subject) -> str:
    """Padding at the right and at the bottom changes nothing, whatever it holds, also where it cuts through a patch."""
    side = subject.pixels(1).shape[-1]
    remark = ""
    for height, width in ((side, side), (side - 3, side - 5), (side // 2 + 1, side)):
        bare = subject.pixels(2, height, width)
        padded, mask = _padded_picture(subject, bare, side + 7, side + 10)
        what = f"padding pictures of {height} × {width} pixels changes the output"
        got, expected = (
            _of_the_whole(subject, **given)
            for given in ({"pixel_values": padded, "pixel_mask": mask}, {"pixel_values": bare})
        )
        remark = assert_same(_cut(got, expected), expected, what, subject.tolerance)
    return remark


def _padded_picture(subject: Subject, bare: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A picture in the corner of a larger one of other numbers, and the mask of what is real."""
    padded = 5 * subject.pixels(len(bare), height, width, salt=1)
    mask = torch.zeros(len(bare), height, width, dtype=torch.long)
    padded[..., : bare.shape[2], : bare.shape[3]] = bare
    mask[:, : bare.shape[2], : bare.shape[3]] = 1
    return padded, mask


@torch.no_grad()
def _of_the_whole(subject: Subject, **inputs: torch.Tensor) -> torch.Tensor:
    """The output for a whole example where there is one, else the main output."""
    output = subject.model(**inputs)
    return output.pooler_output if "pooler_output" in output else main_output(output)


def _cut(got: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The part of a larger output where the smaller one is: the first steps, or the corner of a map."""
    return got[tuple(slice(size) for size in expected.shape)]


@check("senses", "input_values")
def padding_of_sounds(subject: Subject) -> str:
    """Silence or noise after the end, masked, changes nothing; so a batch may hold sounds of several lengths."""
    name = mask_name(subject, "input_values")
    if name is None:
        return "forward takes no mask of the sound"
    longest = subject.waves(3)
    lengths = [longest.shape[1], longest.shape[1] * 2 // 3 + 1, longest.shape[1] // 3]
    mask = (torch.arange(longest.shape[1]) < torch.tensor(lengths)[:, None]).long()
    padded: dict[str, Any] = {"input_values": longest + 3 * (1 - mask), name: mask}
    together = subject.run(**padded)
    remark = ""
    for row, length in enumerate(lengths):
        alone = subject.run(input_values=longest[row, None, :length])[0]
        what = f"padding of {longest.shape[1] - length} samples changes the output of a sound"
        remark = assert_same(_cut(together[row], alone), alone, what, subject.tolerance, ("step",))
    return remark


# ---------------------------------------------------------------------------------------------- sizes and order
@check("senses", "pixel_values", "pixel_mask")
def pictures_of_any_size(subject: Subject) -> str:
    """Other resolutions and shapes, also where patches do not fit, give finite outputs and gradients."""
    side = subject.pixels(1).shape[-1]
    sizes = [(round(side * height) + 1, round(side * width)) for height, width in PICTURES]
    model = subject.copy()
    for height, width in sizes:
        output = main_output(model(pixel_values=subject.pixels(1, height, width)))
        gradients = torch.autograd.grad(
            output.sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True
        )
        if not all(torch.isfinite(x).all() for x in (output, *gradients) if x is not None):
            raise Violation(f"pictures of {height} × {width} pixels give outputs or gradients that are not finite")
    return ", ".join(f"{height} × {width}" for height, width in sizes)


@check("senses", "input_values")
def sounds_of_any_length(subject: Subject) -> str:
    """Short and long sounds, silence and a constant give finite outputs and gradients."""
    rate = subject.waves(1).shape[1] * 4
    model = subject.copy()
    sounds = {
        f"{seconds} s": subject.waves(1, max(int(seconds * rate), subject.samples_per_step)) for seconds in SECONDS
    }
    sounds |= {"silence": torch.zeros_like(subject.waves(1)), "a constant": torch.full_like(subject.waves(1), 0.5)}
    for name, sound in sounds.items():
        output = main_output(model(input_values=sound))
        gradients = torch.autograd.grad(
            output.sum(), [p for p in model.parameters() if p.requires_grad], allow_unused=True
        )
        if not all(torch.isfinite(x).all() for x in (output, *gradients) if x is not None):
            raise Violation(f"{name} gives outputs or gradients that are not finite")
    return ", ".join(sounds)


@check("senses", "pixel_values")
def place_in_a_picture(subject: Subject) -> str:
    """Where something is matters: a picture that is mirrored, upside down or turned gives another output."""
    picture = subject.pixels(2)
    turned = {"mirrored": picture.flip(-1), "upside down": picture.flip(-2), "turned": picture.transpose(-1, -2)}
    return _assert_seen(subject, "pixel_values", picture, turned)


@check("senses", "input_values")
def order_of_a_sound(subject: Subject) -> str:
    """When something is heard matters: a sound reversed, or with its halves exchanged, gives another output."""
    sound = subject.waves(2)
    return _assert_seen(
        subject, "input_values", sound, {"reversed": sound.flip(-1), "in halves": sound.roll(sound.shape[1] // 2, 1)}
    )


def _assert_seen(subject: Subject, name: str, whole: torch.Tensor, changed: Mapping[str, torch.Tensor]) -> str:
    before = _of_the_whole(subject, **{name: whole})
    sizes = {}
    for how, other in changed.items():
        sizes[how] = ((_of_the_whole(subject, **{name: other}) - before).norm() / before.norm()).item()
        if not sizes[how] > SEEN:
            raise Violation(f"an input that is {how} gives the same output: it moves by {sizes[how]:.0e} relative")
    return ", ".join(f"{how} {size:.0e}" for how, size in sizes.items())


# ---------------------------------------------------------------------------------------------- sound as it comes
@check("senses", "input_values", "causal", "cache")
def a_sound_in_pieces(subject: Subject) -> str:
    """Heard in pieces of any length through the cache, a sound gives what it gives at once."""
    sound = subject.waves(2, subject.waves(1).shape[1] * 3)
    whole, remark = subject.run(input_values=sound), ""
    for shares in CUTTINGS:
        cache = RecurrentCache(subject.config)
        outputs = [_heard(subject, piece, cache) for piece in _pieces(sound, shares)]
        got = torch.cat(outputs, 1) if "frames" in subject.features else outputs[-1]
        what = f"hearing a sound in pieces of {', '.join(f'{share:.1%}' for share in shares)} changes the output"
        remark = assert_same(got, whole, what, subject.tolerance)
    return remark


@torch.no_grad()
def _heard(subject: Subject, piece: torch.Tensor, cache: Any) -> torch.Tensor:
    inputs = {"input_values": piece, "use_cache": True, str(subject.cache_name): cache}
    return main_output(subject.model(**inputs))


def _pieces(sound: torch.Tensor, shares: tuple[float, ...]) -> Iterator[torch.Tensor]:
    start, total = 0, 0.0
    for share in shares:
        total += share
        end = round(min(total, 1.0) * sound.shape[1])
        if end > start:
            yield sound[:, start:end]
        start = end


@check("senses", "input_values", "causal", "frames")
def future_of_a_sound(subject: Subject) -> str:
    """No step hears what comes after its end."""
    steps = 12
    sound = subject.waves(1, steps * subject.samples_per_step)
    before, remark = subject.run(input_values=sound), ""
    for step in (1, steps // 2, steps - 1):
        cut = step * subject.samples_per_step
        changed = torch.cat([sound[:, :cut], subject.waves(1, sound.shape[1], salt=1)[:, cut:]], 1)
        after, first = (
            subject.run(input_values=changed),
            step * before.shape[1] // steps,
        )  # a step may have several outputs
        what = f"other samples from {cut} on change the steps before"
        remark = assert_same(after[:, :first], before[:, :first], what, subject.tolerance)
        if torch.equal(after[:, first:], before[:, first:]):
            raise Violation(f"other samples from {cut} on change nothing at all")
    return remark


# ---------------------------------------------------------------------------------------------- several senses
@check("senses", "several senses", "modality_mask")
def missing_senses_add_nothing(subject: Subject) -> str:
    """What is missing by the `modality_mask` gives to the bit what it gives when it is not there, whatever its place
    holds; and the rows of a batch may lack different senses."""
    names, inputs = subject.modalities, subject.inputs(2)
    chosen = [given for count in range(1, len(names)) for given in combinations(names, count)]
    for given in chosen:
        bare = {INPUTS[name]: inputs[INPUTS[name]] for name in given}
        mask = torch.tensor([[name in given for name in names]] * 2)
        for salt in (0, 1):
            others = subject.inputs(2, salt=salt)
            junk = {INPUTS[name]: others[INPUTS[name]] for name in names if name not in given}
            expected, got = (subject.model(**bare), subject.model(**bare, **junk, modality_mask=mask))
            wrong = [name for name, x in expected.items() if is_output(x) and not torch.equal(x, got[name])]
            if wrong:
                alone = " and ".join(given)
                raise Violation(f"with {alone} alone, the places of the missing senses change {wrong[0]}")
    return f"{len(chosen)} choices of {', '.join(names)}, to the bit"


@check("senses", "several senses", "modality_mask")
def rows_that_lack_different_senses(subject: Subject) -> str:
    """Each row of a batch may lack other senses, and gives what it gives alone."""
    names = subject.modalities
    rows = [given for count in range(1, len(names) + 1) for given in combinations(names, count)]
    inputs = subject.inputs(len(rows))
    mask = torch.tensor([[name in given for name in names] for given in rows])
    together = subject.run(**inputs, modality_mask=mask)
    if len(together) != len(rows):
        return "its output has no rows"
    remark = ""
    for row, given in enumerate(rows):
        alone = subject.run(**{INPUTS[name]: inputs[INPUTS[name]][row, None] for name in given})
        if alone.shape[1:] != together.shape[1:]:
            return "its output depends on which senses are there"
        what = f"a row with {' and '.join(given)} in a batch of others differs from that row alone"
        remark = assert_same(together[row, None], alone, what, subject.tolerance)
    return remark


@check("senses", "several senses")
def every_sense_counts(subject: Subject) -> str:
    """Another text, picture or sound gives another output."""
    inputs = subject.inputs(2)
    before = subject.run(**inputs)
    others = subject.inputs(2, salt=1)
    for name in subject.modalities:
        after = subject.run(**inputs | {INPUTS[name]: others[INPUTS[name]]})
        if not ((after - before).norm() / before.norm()).item() > SEEN:
            raise Violation(f"another input for {name} gives the same output")
    return ", ".join(subject.modalities)


# ---------------------------------------------------------------------------------------------- errors and processors
@check("senses", "strict_arguments")
def bad_inputs_are_refused(subject: Subject) -> str:
    """Inputs of other shapes or kinds, and none at all, raise a ValueError or TypeError that names the argument."""
    bad = list(_bad_inputs(subject))
    for name, what, inputs in bad:
        try:
            subject.model(**inputs)
        except (ValueError, TypeError) as error:
            if name not in str(error):
                raise Violation(f"{what}: the error does not name {name!r}: {error}") from error
        else:
            raise Violation(f"{what} is taken without an error")
    return f"{len(bad)} bad inputs" if bad else "it reads"


def _bad_inputs(subject: Subject) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The argument, what is wrong, and inputs."""
    if "pixel_values" in subject.features:
        picture = subject.pixels(2)
        yield "pixel_values", "a picture with other channels", {"pixel_values": torch.cat([picture, picture], 1)}
        yield "pixel_values", "a picture without a batch", {"pixel_values": picture[0]}
        yield "pixel_values", "whole numbers for pixels", {"pixel_values": (255 * picture).long()}
        if "pixel_mask" in subject.features:
            yield "pixel_mask", "a mask of another size", {"pixel_values": picture, "pixel_mask": torch.ones(2, 3, 3)}
    if "input_values" in subject.features:
        sound = subject.waves(2)
        yield "input_values", "a sound with two channels", {"input_values": sound[:, None].expand(-1, 2, -1)}
        yield "input_values", "whole numbers for samples", {"input_values": (99 * sound).long()}
        name = mask_name(subject, "input_values")
        if name:
            yield "attention_mask", "a mask of another length", {"input_values": sound, name: torch.ones(2, 3)}
    if subject.modalities and subject.modalities != ["text"]:
        yield INPUTS[subject.modalities[0]], "nothing at all", {}
    if "several senses" in subject.features and "modality_mask" in subject.features:
        inputs = subject.inputs(2)
        nothing = torch.zeros(2, len(subject.modalities), dtype=torch.bool)
        yield "modality_mask", "an example without any sense", {**inputs, "modality_mask": nothing}


@check("persistence")
def saved_with_its_processor(subject: Subject) -> str:
    """A model and what prepares its inputs come back from one folder, and answer as before."""
    architecture = architectures().get(subject.config.model_type)
    auto = _auto_processor(subject)
    if architecture is None or auto is None or auto not in architecture.preprocessors:
        return "it has no processor of pictures or sounds"
    processor, model = _processor(subject, auto), subject.copy(torch.float32)
    raw = _raw_inputs(subject)
    with TemporaryDirectory() as folder, quiet():
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        loaded = getattr(transformers, auto).from_pretrained(folder)
        again = type(model).from_pretrained(folder).eval()
    if type(loaded) is not type(processor):
        raise Violation(f"{auto} loads a {type(loaded).__name__} instead of a {type(processor).__name__}")
    before, after = (prepare(**raw, return_tensors="pt") for prepare in (processor, loaded))
    for name, value in before.items():
        if not torch.equal(value, after[name]):
            raise Violation(f"a loaded processor gives other {name}")
    got, expected = (subject.run(model=one, **dict(after)) for one in (again, model))
    return f"{type(loaded).__name__}, {assert_same(got, expected, 'the loaded model gives other outputs', 1e-6)}"


def _auto_processor(subject: Subject) -> str | None:
    if len(subject.modalities) > 1:
        return "AutoProcessor"
    names = {"vision": "AutoImageProcessor", "audio": "AutoFeatureExtractor"}
    return names.get("".join(subject.modalities))


def _processor(subject: Subject, auto: str) -> Any:
    """A new processor that fits the config."""
    if auto != "AutoProcessor":
        return new_processor(auto, subject.config)
    makers = {
        "text": ("tokenizer", lambda: character_tokenizer(["ab "])),
        "vision": ("image_processor", lambda: new_processor("AutoImageProcessor", subject.config.vision_config)),
        "audio": ("feature_extractor", lambda: new_processor("AutoFeatureExtractor", subject.config.audio_config)),
    }
    parts = dict(makers[name] for name in subject.modalities)
    return architectures()[subject.config.model_type].processor(**{name: make() for name, make in parts.items()})


def _raw_inputs(subject: Subject) -> dict[str, Any]:
    """What a processor is given: pictures as arrays of bytes, sounds as floats."""
    pictures = (subject.pixels(2).sigmoid() * 255).byte().permute(0, 2, 3, 1).numpy()  # [B, H, W, C]
    sounds = [sound.float().numpy() for sound in subject.waves(2)]
    several = len(subject.modalities) > 1
    raw = {
        "text": {"text": ["ab", "a ba"]},
        "vision": {"images": list(pictures)},
        "audio": {"audio" if several else "raw_speech": sounds},
    }
    return {name: value for modality in subject.modalities for name, value in raw[modality].items()}
