"""Trainer whose texts are shared by several processes, each of which computes a part of every text."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.utils.data import DataLoader

from ..data.scoring import only_logits, summed_scores
from ..distributed import ContextParallel
from ..errors import HoloError
from ..modeling.cache import CACHE_NAME
from ..modeling.losses import IGNORED
from .arguments import HoloTrainingArguments
from .trainer import HoloTrainer


class ContextTrainer(HoloTrainer):
    """[`HoloTrainer`] of a causal language model with [`ContextParallel`], in training and evaluation.

    Processes that share texts, neighbours in rank, are given the same batches. The global batch is that of
    `world_size / context_parallel_size` processes, and the results are theirs.

    Args:
        model, args, others: as of [`HoloTrainer`]; `args.context_parallel_size` says how many share a text.

    Raises:
        HoloError: the model cannot be computed so, or there is a `compute_loss_func`.
    """

    def __init__(self, model: Any, args: HoloTrainingArguments, *others: Any, **kwargs: Any) -> None:
        super().__init__(model, args, *others, **kwargs)
        if self.compute_loss_func is not None:
            raise HoloError("compute_loss_func: with context_parallel_size the loss is the model's own; leave it out")
        try:
            self.context = ContextParallel(self.model, args.context_parallel_size)
        except ValueError as error:
            raise HoloError(str(error)) from None
        self.preprocess_logits_for_metrics = None  # prediction_step has done it
        self.accelerator.prepare_data_loader = self._prepare_data_loader

    @property
    def _groups(self) -> int:
        """How many groups of processes share texts."""
        return self.args.world_size // self.context.size

    def _prepare_data_loader(self, loader: DataLoader, *_: Any, **__: Any) -> DataLoader:
        """As Accelerate does it, but the processes of a group are one to it."""
        accelerator = self.accelerator
        prepared = prepare_data_loader(
            loader,
            accelerator.device,
            num_processes=self._groups,
            process_index=self.args.process_index // self.context.size,
            split_batches=accelerator.split_batches,
            put_on_device=accelerator.device_placement,
            rng_types=list(accelerator.rng_types),
            dispatch_batches=False,
            use_seedable_sampler=accelerator.use_seedable_sampler,
            data_seed=accelerator.dataloader_config.data_seed,
            non_blocking=accelerator.non_blocking,
        )
        accelerator._dataloaders.append(prepared)
        return prepared

    def get_total_train_batch_size(self, args: Any) -> int:
        return super().get_total_train_batch_size(args) // self.context.size

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return super().floating_point_ops(inputs) // self.context.size

    def _get_num_items_in_batch(self, *args: Any, **kwargs: Any) -> Any:
        """Labels of all groups, where transformers adds up those of all processes."""
        items = super()._get_num_items_in_batch(*args, **kwargs)
        return items // self.context.size if items is not None and self.args.average_tokens_across_devices else items

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The share of this part of the text. DistributedDataParallel takes the mean of the gradients over all
        processes; so a share counts as often as there are parts, unless transformers has seen to it."""
        mine = self.context.part(**self._long_enough(inputs))
        with self.context.own_randomness():
            loss, outputs = super().compute_loss(model, mine, True, num_items_in_batch)
        loss = mine[CACHE_NAME].joined(loss)
        if num_items_in_batch is None or not self.args.average_tokens_across_devices:
            loss = loss * self.context.size
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        """With the sums of [`summed_scores`] over all parts in the place of logits, `[B, 3]`."""
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        return loss, None if logits is None else self._sums(only_logits(logits), inputs), labels

    def _sums(self, logits: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        labels = self._long_enough(inputs)["labels"].to(logits.device)
        start, stop = self.context.bounds(labels.shape[1])
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED)[:, start:stop]
        sums = summed_scores(logits, labels, shift=False)
        dist.all_reduce(sums, group=self.context.channel.group)
        # Trainer puts the rows of all processes in a row, and takes of the last batch as many as there are: the first
        # processes give those of the groups, once each, and the others zeros
        every = [torch.empty_like(sums) for _ in range(self.args.world_size)]
        dist.all_gather(every, sums)
        rank = self.args.process_index
        return every[rank * self.context.size] if rank < self._groups else torch.zeros_like(sums)

    def _long_enough(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch, padded where the last window of a text has fewer tokens than there are parts."""
        ids = inputs["input_ids"]
        missing = self.context.size - ids.shape[1]
        if missing <= 0:
            return inputs
        mask = inputs.get("attention_mask", torch.ones_like(ids))
        return {
            **inputs,
            "input_ids": F.pad(ids, (0, missing)),
            "attention_mask": F.pad(mask, (0, missing)),
            "labels": F.pad(inputs["labels"], (0, missing), value=IGNORED),
        }
