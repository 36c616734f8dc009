"""Samplers, collation and the training loader that the data modules share.

The samplers derive from ``DistributedSampler`` so that Lightning leaves them in place under every strategy.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler


class ShardSampler(DistributedSampler):
    """Every row exactly once, for evaluation: process ``rank`` of W takes rows rank, rank + W, …

    Processes may get one row more or less than others, so nothing may communicate per batch; metrics are combined once,
    at the end of the epoch.
    """

    def __init__(self, size: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(range(size), num_replicas=num_replicas, rank=rank, shuffle=False)
        self._rows = range(rank, size, num_replicas)

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


class TrainSampler(DistributedSampler):
    """Rows in an order drawn from the seed and the epoch, the same number for each process.

    The W processes' batches of one step together hold the rows that one process with W times the batch would get.
    Rows left over at the end of an epoch are dropped. ``first_row`` rows are left out when training resumes within an
    epoch.
    """

    def __init__(self, size: int, num_replicas: int = 1, rank: int = 0, seed: int = 0) -> None:
        super().__init__(range(size), num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed, drop_last=True)
        self.first_row = 0

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(len(self.dataset), generator=self._generator()).tolist()
        return iter(order[self.rank : self.total_size : self.num_replicas][self.first_row :])

    def _generator(self) -> torch.Generator:
        # Not seed + epoch: the second epoch of a seed would be the first one of the next seed.
        return torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)


class WindowSampler(TrainSampler):
    """Starts of windows of ``seq_len`` tokens that tile a text of ``num_tokens`` from an offset drawn per epoch."""

    def __init__(self, num_tokens: int, seq_len: int, num_replicas: int = 1, rank: int = 0, seed: int = 0) -> None:
        # As many windows as fit behind the largest offset, so that every epoch has the same number.
        super().__init__(max(1, (num_tokens + 1) // seq_len - 1), num_replicas, rank, seed)
        self.seq_len = seq_len
        self.num_offsets = min(seq_len, num_tokens - seq_len + 1)

    def __iter__(self) -> Iterator[int]:
        offset = int(torch.randint(self.num_offsets, (), generator=self._generator()))
        return (offset + window * self.seq_len for window in super().__iter__())


class ResumableLoader(DataLoader):
    """A training loader whose position is saved in checkpoints, so that a run resumes with the batch it had reached.

    Needs a ``TrainSampler``. Lightning finds ``state_dict`` and ``load_state_dict`` by itself.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._position = {"epoch": 0, "batches": 0}
        self._resume: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:
        epoch, done = self.sampler.epoch, 0
        if self._resume is not None and self._resume["epoch"] == epoch:
            done = self._resume["batches"]
        self._resume = None
        self.sampler.first_row = done * self.batch_size
        for batch in super().__iter__():
            done += 1
            self._position = {"epoch": epoch, "batches": done}
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch, and batches handed out in it."""
        return dict(self._position)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue, in the epoch of that state, behind the batches already handed out."""
        self._resume, self._position = dict(state), dict(state)


class PadCollator:
    """Rows of token lists to one batch, padded to the longest row on one side.

    A row holds lists (``input_ids``, optional ``attention_mask``, ``token_type_ids``, per-token ``labels``) or numbers
    (class ``labels``, ``idx``). Gives int64 tensors [N, T] (float32 [N] for fractional labels) and always an
    ``attention_mask``, which is 1 in one contiguous run per row.
    """

    def __init__(self, pad_token_id: int, padding_side: str = "right", pad_token_type_id: int = 0) -> None:
        self.padding_side = padding_side
        self.fill = {"input_ids": pad_token_id, "token_type_ids": pad_token_type_id, "labels": -100}

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        lengths = [len(row["input_ids"]) for row in rows]
        batch = {"attention_mask": self._pad([torch.ones(length, dtype=torch.int64) for length in lengths], 0)}
        for name in rows[0].keys() - {"attention_mask"}:
            values = [torch.as_tensor(row[name]) for row in rows]
            batch[name] = torch.stack(values) if values[0].ndim == 0 else self._pad(values, self.fill[name])
        return batch

    def _pad(self, values: list[torch.Tensor], fill: int) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            values, batch_first=True, padding_value=fill, padding_side=self.padding_side
        )


def train_loader(
    dataset: Dataset, sampler: TrainSampler, collate: PadCollator, batch_size: int, num_workers: int
) -> ResumableLoader:
    """The loader of a training split; incomplete batches are dropped.

    Raises ValueError if there is not one full batch.
    """
    if len(sampler) < batch_size:
        raise ValueError(
            f"batch_size is {batch_size}, but the training split gives each of {sampler.num_replicas} process(es) only "
            f"{len(sampler)} rows"
        )
    return ResumableLoader(
        dataset,
        batch_size,
        sampler=sampler,
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        drop_last=True,
    )


def evaluation_loader(
    dataset: Dataset, world: tuple[int, int], collate: PadCollator, batch_size: int, num_workers: int
) -> DataLoader:
    """The loader of a split where each row counts exactly once; ``world`` is (number of processes, rank).

    Raises ValueError if there are fewer rows than processes: a process without a batch would leave the others waiting.
    """
    if len(dataset) < world[0]:
        raise ValueError(f"a split to evaluate has {len(dataset)} rows, fewer than the {world[0]} processes")
    return DataLoader(
        dataset,
        batch_size=batch_size,  # by name: Lightning builds the loader anew to predict
        sampler=ShardSampler(len(dataset), *world),
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )
