import time

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from lightning_sea.callbacks import MemoryMonitor
from lightning_sea.callbacks.memory import PeakMemory, count_tokens


def test_the_peak_sees_memory_that_is_freed_again():
    memory = PeakMemory(torch.device("cpu"))
    memory.start()
    before = memory.read()
    block = torch.ones(256 * 2**18)  # 256 MiB
    time.sleep(0.2)
    del block
    memory.stop()
    assert 200 < memory.read() - before < 400


def test_a_new_start_forgets_the_old_peak():
    memory = PeakMemory(torch.device("cpu"))
    memory.start()
    block = torch.ones(256 * 2**18)
    high = memory.read()
    del block
    memory.start()
    assert memory.read() < high - 200
    memory.stop()


def test_only_real_tokens_are_counted(loader):
    (batch,) = loader([[48, 31, 7]])
    assert count_tokens(batch) == 86
    assert count_tokens({"input_ids": batch["input_ids"]}) == 144
    with pytest.raises(KeyError, match="expected input_ids or attention_mask"):
        count_tokens({"labels": batch["input_ids"]})


def test_test_logs_peak_and_rate(distiller, loader, trainer):
    module = distiller("gpt2")
    start = time.perf_counter()
    (found,) = trainer(MemoryMonitor()).test(module, loader([[48, 20], [10]]), verbose=False)
    whole = time.perf_counter() - start
    assert found["test/tokens_per_second"] >= 78 / whole
    assert found["test/peak_memory_mib"] > 50
    assert not any(name.startswith("val/") for name in found)


def test_training_logs_when_the_trainer_does(distiller, loader, trainer, tmp_path):
    run = trainer(MemoryMonitor(), logger=CSVLogger(tmp_path), log_every_n_steps=2, accumulate_grad_batches=2)
    run.fit(distiller("gpt2"), loader([[48]] * 8), loader([[48]]))
    assert run.logged_metrics["train/tokens_per_second"] > 0
    assert "val/peak_memory_mib" not in run.callback_metrics
    run = trainer(MemoryMonitor(), log_every_n_steps=1)
    run.fit(distiller("gpt2"), loader([[48]]))
    assert not run.callback_metrics
