"""What a run costs: peak memory and tokens per second."""

import threading
import time
from collections.abc import Mapping

import psutil
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from .recording import logs_this_step, stage_name

MIB = 2**20


class PeakMemory:
    """Peak memory in MiB between ``start`` and ``read``: of a CUDA device, or of this process anywhere else.

    A CUDA peak is what PyTorch's allocator handed out. A process's peak is its resident set, read ``rate`` times a
    second by a thread, because it cannot be asked for its peak on every platform, nor told to forget an old one.
    """

    def __init__(self, device: torch.device, rate: float = 50.0) -> None:
        self.device = device
        self.rate = rate
        self._thread: threading.Thread | None = None

    def start(self) -> float:
        """Forget earlier peaks and start to watch; returns the memory in use now, in MiB."""
        self.stop()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device) / MIB
        self._process = psutil.Process()
        self._peak = self._process.memory_info().rss
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)
        self._thread.start()
        return self._peak / MIB

    def read(self) -> float:
        """The peak so far, in MiB."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / MIB
        self._peak = max(self._peak, self._process.memory_info().rss)
        return self._peak / MIB

    def stop(self) -> None:
        """Stop to watch; ``read`` still gives the peak of a CUDA device or what was seen of the process."""
        if self._thread is not None:
            self._stopped.set()
            self._thread.join()
            self._thread = None

    def _watch(self) -> None:
        while not self._stopped.wait(1 / self.rate):
            self._peak = max(self._peak, self._process.memory_info().rss)


def count_tokens(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Real tokens of a batch, as a scalar on its device (so that nothing waits for it).

    Raises:
        KeyError: if the batch has neither ``attention_mask`` nor ``input_ids``.
    """
    if batch.get("attention_mask") is not None:
        return (batch["attention_mask"] != 0).sum()
    if "input_ids" not in batch:
        raise KeyError(f"batch has the keys {sorted(batch)}, expected input_ids or attention_mask among them")
    return torch.tensor(batch["input_ids"].numel(), device=batch["input_ids"].device)


class MemoryMonitor(Callback):
    """Logs, with ``{stage}`` one of train, val, test:

    - ``{stage}/peak_memory_mib``: peak since the stage began, the highest of all ranks; of the CUDA device, or of the
      whole process elsewhere. Validation inside a fit counts as training; it has no numbers of its own.
    - ``{stage}/tokens_per_second``: real tokens, summed over the ranks, since the last logged step in training and over
      the whole run in validation and testing. Everything between the batches is included.

    In training it logs when the trainer does.
    """

    def __init__(self) -> None:
        self._memory: PeakMemory | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._inside_fit(trainer):
            self._start(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since, self._tokens = time.perf_counter(), 0  # what came before was no training

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._step_logs = logs_this_step(trainer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._tokens = self._tokens + count_tokens(batch)
        if self._step_logs and trainer.global_step % trainer.log_every_n_steps == 0:  # not while accumulating gradients
            self._log(trainer, pl_module, on_step=True)
            self._since, self._tokens = time.perf_counter(), 0

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        if not self._inside_fit(trainer):
            self._tokens = self._tokens + count_tokens(batch)

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        self._tokens = self._tokens + count_tokens(batch)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._inside_fit(trainer):
            self._log(trainer, pl_module, on_step=False)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(trainer, pl_module, on_step=False)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._memory is not None:
            self._memory.stop()

    def _start(self, pl_module: LightningModule) -> None:
        self._memory = PeakMemory(pl_module.device)
        self._memory.start()
        self._since, self._tokens = time.perf_counter(), 0

    @staticmethod
    def _inside_fit(trainer: Trainer) -> bool:
        return trainer.state.fn == "fit"

    def _log(self, trainer: Trainer, pl_module: LightningModule, on_step: bool) -> None:
        stage, when = stage_name(trainer), {"on_step": on_step, "on_epoch": not on_step, "sync_dist": True}
        peak = self._memory.read()
        pl_module.log(f"{stage}/peak_memory_mib", peak, reduce_fx="max", batch_size=1, **when)
        rate = float(self._tokens) / (time.perf_counter() - self._since)
        pl_module.log(f"{stage}/tokens_per_second", rate, reduce_fx="sum", batch_size=1, **when)
