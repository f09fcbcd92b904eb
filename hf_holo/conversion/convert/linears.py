"""Linear layers become holographic, in place: fitted to a text, or in regenerated bases."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...distributed.processes import by_main, gathered, is_main, share_of
from ...modeling.harmonics import HoloLinear
from ..sources import Source, Text, mixed
from ..surgery.apply import apply_surgery, mark
from ..surgery.calibration import (
    Factors,
    Site,
    Statistics,
    allocate,
    check_ratio,
    collect,
    factorise,
    find_sites,
    install_all,
    stacked_weight,
    statistics_bytes,
    surgery_plan,
    without_gradients,
)
from ..surgery.plan import choose, other_matrices, plan
from ..surgery.refit import check_refit, refit, worth_refitting
from ..work_folder import WorkFolder
from .arguments import ConvertArguments
from .conversion import Conversion, size_in_bytes
from .linear_report import LayerRow, plot_layers, print_coverage, write_layers


class RegeneratedSurgery(Conversion):
    """The surgery of the HOLO reference: bases that are recomputed on loading, coefficients to be trained."""

    lesson = "distill-surgery"
    advice = "It has to be trained before it is of use, best on what its teacher says:"
    error_of = "weights"

    def __init__(self, source: Source, options: ConvertArguments) -> None:
        super().__init__(source, options)
        self.surgery = options.surgery()
        self.dense = {
            name: sum(p.numel() for p in self.twin.get_submodule(name).parameters())
            for name in choose(self.twin, self.surgery)
        }
        self.others = other_matrices(self.twin)
        self.disk = size_in_bytes(self.twin)
        self.rows: list[LayerRow] = []
        self._check()

    def _check(self) -> None:
        """Raises HoloError if the layers do not fit the options."""
        plan(self.twin, self.surgery)

    def print_coverage(self) -> None:
        twin = self.source.without_weights()
        report = apply_surgery(twin, self.surgery)
        print_coverage(report, twin.config.quantization_config.layers)
        if self.others:
            print(f"Not converted: {self._others()}.")

    def measure(self, model: PreTrainedModel, texts: list[Text], work: WorkFolder) -> None:
        """The bases depend on no text."""

    def apply(self, model: PreTrainedModel, texts: list[Text], work: WorkFolder) -> PreTrainedModel:
        for row in apply_surgery(model, self.surgery).converted:
            layer = cast(HoloLinear, model.get_submodule(row["module"]))
            sizes = layer.harmonics, layer.in_features, row["numbers_before"], row["stored"]
            self.rows.append(LayerRow((row["module"],), *sizes, row["error"]))
        return model

    def figures(self, stored: Mapping[str, int]) -> dict[str, Any]:
        names = tuple(f"{name}." for name in self.dense)
        kept = sum(count for key, count in stored.items() if key.startswith(names)) / sum(self.dense.values())
        return {"kept": kept, "not_linear_layers": self.others}

    def summary(self, figures: dict[str, Any]) -> str:
        kept = f"{figures['kept']:.1%} of the values of the chosen linear layers kept on disk, stored bases included"
        return f"{kept}; not converted: {self._others()}" if self.others else kept

    def _others(self) -> str:
        """What stays because it is not a linear layer, as the end of a sentence."""
        names = ", ".join(self.others)
        return f"{sum(self.others.values()):,} values in the blocks that are not in linear layers: {names}"

    def write_layers(self, result: Path) -> None:
        write_layers(result / "layers.csv", self.rows)
        plot_layers(result / "ranks.png", self.rows, "harmonics", "harmonics ÷ largest rank (dense: 1)")
        plot_layers(result / "error.png", self.rows, "error", f"squared error of the {self.error_of}, relative")


class CalibratedSurgery(RegeneratedSurgery):
    """Stored bases, fitted to activations and gradients on a text; see [`hf_holo.conversion.surgery.calibration`].

    Memory: the statistics of as many sites as `options.memory` allows; those of the others are in the work folder.
    Several processes share the windows, and the sites to be factorised.
    """

    advice = "It was fitted and not trained; training on what its teacher says brings it closer:"
    error_of = "outputs"

    def _check(self) -> None:
        self.sites = find_sites(self.twin, self.surgery)
        self.ratio = cast(float, self.options.ratio)  # calibrated options have one
        check_ratio(self.sites, self.ratio)
        wanted = self.options.refit
        if wanted:
            check_refit(self.twin, self.sites)
        self.refit = worth_refitting(self.twin, self.sites, self.options.tokens) if wanted is None else wanted
        self.disk += 4 * sum(2 * site.size**2 for site in self.sites)
        if self.refit:
            self.disk += size_in_bytes(self.twin)  # at most: the finished blocks

    def print_coverage(self) -> None:
        """A conversion will move harmonics between the layers; the table gives all the same share."""
        self.surgery.layers = surgery_plan(self.sites, [site.largest_rank(self.ratio) or 1 for site in self.sites])
        super().print_coverage()

    def measure(self, model: PreTrainedModel, texts: list[Text], work: WorkFolder) -> None:
        """Bring the factors of all sites into the work folder, as far as they are not there yet.

        At no time is more in memory than the model, the statistics of some sites (`options.memory`) and the factors of
        one.
        """
        options, windows = self.options, mixed(texts)
        fisher_windows = windows[: options.fisher_tokens // options.block_size]
        for batch in portions(self.sites, options.memory * 2**30):
            lacking = [n for n in batch if not work.has_tensors(_factors(n))]
            unknown = [n for n in lacking if not work.has_tensors(_statistics(n))]
            lacking, unknown = gathered((lacking, unknown))[0]  # nobody writes before all have looked
            if unknown:
                sites = [self.sites[number] for number in unknown]
                measured = collect(model, sites, windows, fisher_windows, options.seed, shared=True)
                by_main(partial(save_statistics, work, dict(zip(unknown, measured, strict=True))))
                del measured
            for place in tqdm(share_of(len(lacking)), desc="factors", unit="site", disable=not is_main()):
                factorise_into(work, model, self.sites[lacking[place]], lacking[place])
            if not self.refit:
                by_main(partial(drop_statistics, work, batch))
        by_main(lambda: None)  # all factors are there

    def apply(self, model: PreTrainedModel, texts: list[Text], work: WorkFolder) -> PreTrainedModel:
        """Choose the ranks and convert, in place, with the factors in the work folder."""
        numbers = range(len(self.sites))
        losses = [work.load_tensors(_factors(number), "loss")["loss"] for number in numbers]
        ranks = allocate(self.sites, losses, self.ratio)
        self.unseen = [site.layers[0] for site, loss in zip(self.sites, losses, strict=True) if not loss.any()]
        if self.refit:
            fishers = [work.load_tensors(_statistics(number), "fisher")["fisher"] for number in numbers]
            errors = refit(model, self.sites, ranks, fishers, mixed(texts), work, shared=True)
        else:
            factors = (Factors(**work.load_tensors(_factors(number))) for number in tqdm(numbers, desc="surgery"))
            errors = install_all(model, self.sites, ranks, factors)
        for site, rank, error in zip(self.sites, ranks, errors, strict=True):
            self.rows.append(LayerRow(site.layers, rank, site.size, site.numbers, site.stored(rank), error))
        self.surgery.layers = surgery_plan(self.sites, ranks)
        mark(model, self.surgery)
        return model

    def figures(self, stored: Mapping[str, int]) -> dict[str, Any]:
        return {**super().figures(stored), "unseen_experts": self.unseen}

    def summary(self, figures: dict[str, Any]) -> str:
        said = super().summary(figures)
        if self.unseen:
            said += f"; {len(self.unseen)} layers of experts that too few tokens came to, fitted to their weights alone"
        return said


def save_statistics(work: WorkFolder, measured: dict[int, Statistics]) -> None:
    """Of sites, by their numbers."""
    for number, statistics in measured.items():
        work.save_tensors(_statistics(number), asdict(statistics))


def drop_statistics(work: WorkFolder, numbers: list[int]) -> None:
    """Of these sites, whose factors are there."""
    for number in numbers:
        work.drop_tensors(_statistics(number))


def factorise_into(work: WorkFolder, model: PreTrainedModel, site: Site, number: int) -> None:
    """The factors of one site, from its statistics. Where these lack, as of an expert that no token came to, the losses
    are all zero."""
    weight, statistics = stacked_weight(model, site), Statistics(**work.load_tensors(_statistics(number)))
    known = bool(statistics.gram.any() and statistics.fisher is not None and statistics.fisher.any())
    factors = factorise(site, weight, statistics if known else without_gradients(model, site, statistics.gram))
    factors = factors if known else replace(factors, loss=torch.zeros_like(factors.loss))
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
