"""Samplers, the resumable loader and padding."""

from itertools import chain, pairwise

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_sea.data.loading import (
    PadCollator,
    ResumableLoader,
    ShardSampler,
    TrainSampler,
    WindowSampler,
    evaluation_loader,
    train_loader,
)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [5, 6, 7, 11])
def test_shards_hold_every_row_once(size, world):
    shards = [list(ShardSampler(size, world, rank)) for rank in range(world)]
    assert sorted(chain.from_iterable(shards)) == list(range(size))
    assert [len(ShardSampler(size, world, rank)) for rank in range(world)] == [len(shard) for shard in shards]


@pytest.mark.parametrize("size", [12, 13, 23])
def test_processes_share_the_batches_of_one(size):
    """Step i of two processes sees the rows that one process with twice the batch sees in step i."""
    alone = list(TrainSampler(size, seed=3))
    ranks = [list(TrainSampler(size, 2, rank, seed=3)) for rank in range(2)]
    for step in range(size // 6):
        ours = {*ranks[0][3 * step : 3 * step + 3], *ranks[1][3 * step : 3 * step + 3]}
        assert ours == set(alone[6 * step : 6 * step + 6])
    assert len(ranks[0]) == len(ranks[1]) == size // 2


def test_order_depends_on_seed_and_epoch_alone():
    orders = {}
    for seed, epoch in [(0, 0), (0, 1), (1, 0)]:
        sampler, again = TrainSampler(50, seed=seed), TrainSampler(50, seed=seed)
        sampler.set_epoch(epoch)
        again.set_epoch(epoch)
        orders[seed, epoch] = list(sampler)
        assert list(again) == orders[seed, epoch]
        assert sorted(orders[seed, epoch]) == list(range(50))
    assert len(set(map(tuple, orders.values()))) == 3


@pytest.mark.parametrize("num_tokens", [8, 9, 15, 16, 30, 31, 32, 33])
def test_windows_tile_the_text_from_every_offset(num_tokens):
    seq_len, offsets = 8, set()
    sampler = WindowSampler(num_tokens, seq_len)
    for epoch in range(60):
        sampler.set_epoch(epoch)
        starts = sorted(sampler)
        assert len(starts) == len(sampler)
        assert {later - earlier for earlier, later in pairwise(starts)} <= {seq_len}
        assert starts[0] >= 0
        assert starts[-1] + seq_len <= num_tokens
        offsets.add(starts[0])
    assert offsets == set(range(min(seq_len, num_tokens - seq_len + 1)))


def test_processes_draw_the_same_offset():
    starts = [set(WindowSampler(100, 8, 2, rank, seed=5)) for rank in range(2)]
    assert not starts[0] & starts[1]
    assert len({start % 8 for start in starts[0] | starts[1]}) == 1


def numbers_loader(seed=0, num_workers=0) -> ResumableLoader:
    rows = [{"input_ids": [number]} for number in range(22)]
    return train_loader(rows, TrainSampler(22, seed=seed), PadCollator(0), batch_size=4, num_workers=num_workers)


def numbers(batches) -> list[list[int]]:
    return [batch["input_ids"].flatten().tolist() for batch in batches]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loader_resumes_behind_the_batches_of_its_epoch(num_workers):
    whole = numbers(numbers_loader())
    stopped = numbers_loader(num_workers=num_workers)
    iterator = iter(stopped)
    seen = numbers([next(iterator), next(iterator)])
    resumed = numbers_loader(num_workers=num_workers)
    resumed.load_state_dict(stopped.state_dict())
    assert seen + numbers(resumed) == whole
    assert len(resumed) == len(whole) == 5
    assert numbers(resumed) == whole  # a later pass starts from the beginning


def test_loader_starts_another_epoch_from_the_beginning():
    loader = numbers_loader()
    loader.load_state_dict({"epoch": 0, "batches": 3})
    loader.sampler.set_epoch(1)
    assert len(numbers(loader)) == 5


class Recording(LightningModule):
    """Keeps the rows it trains on; its one weight follows their order."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["input_ids"].flatten().tolist())
        return (self.weight - batch["input_ids"].float().mean()).square()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


def fit(tmp_path, steps, checkpoint=None, **options):
    module = Recording()
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=steps, default_root_dir=tmp_path, logger=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    trainer.fit(module, numbers_loader(), ckpt_path=checkpoint)
    return module


@pytest.mark.parametrize("stop", [3, 5, 7])
@pytest.mark.parametrize("limit", [1.0, 3])
def test_a_stopped_run_goes_on_with_the_same_rows(tmp_path, stop, limit):
    """Stopped within an epoch, at its end, and in the next; with whole epochs and with limited ones."""
    options = {"limit_train_batches": limit, "enable_checkpointing": False}
    whole = fit(tmp_path, 11, **options)
    keep = ModelCheckpoint(tmp_path, "stopped", every_n_train_steps=1, save_top_k=1)
    first = fit(tmp_path, stop, limit_train_batches=limit, callbacks=[keep])
    second = fit(tmp_path, 11, checkpoint=keep.best_model_path, **options)
    assert first.seen + second.seen == whole.seen
    assert torch.equal(second.weight, whole.weight)


def test_padding_on_either_side():
    rows = [
        {"input_ids": [7, 8, 9], "token_type_ids": [0, 0, 1], "labels": [7, 8, 9]},
        {"input_ids": [6], "token_type_ids": [1], "labels": [6]},
    ]
    right = PadCollator(5, "right")(rows)
    assert right["input_ids"].tolist() == [[7, 8, 9], [6, 5, 5]]
    assert right["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert right["token_type_ids"].tolist() == [[0, 0, 1], [1, 0, 0]]
    assert right["labels"].tolist() == [[7, 8, 9], [6, -100, -100]]
    left = PadCollator(5, "left")(rows)
    assert left["input_ids"].tolist() == [[7, 8, 9], [5, 5, 6]]
    assert left["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert left["labels"].tolist() == [[7, 8, 9], [-100, -100, 6]]


def test_numbers_are_stacked():
    batch = PadCollator(0)([{"input_ids": [1], "labels": 2.5, "idx": 4}, {"input_ids": [2], "labels": 0.0, "idx": 9}])
    assert batch["labels"].tolist() == [2.5, 0.0]
    assert batch["labels"].dtype == torch.float32
    assert batch["idx"].tolist() == [4, 9]


def test_too_few_rows_for_the_processes():
    rows = [{"input_ids": [1]}] * 3
    with pytest.raises(ValueError, match=r"batch_size is 2, .* each of 2 process.* only 1 rows"):
        train_loader(rows, TrainSampler(3, 2, 0), PadCollator(0), batch_size=2, num_workers=0)
    with pytest.raises(ValueError, match="3 rows, fewer than the 4 processes"):
        evaluation_loader(rows, (4, 0), PadCollator(0), batch_size=1, num_workers=0)
