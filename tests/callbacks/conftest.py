import pytest
import torch
from families import VOCABULARY, tiny_model
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader

from lightning_sea.adapt import convert, sea_layers
from lightning_sea.config import SEAConfig
from lightning_sea.recorder import AttentionRecorder


class Distiller(LightningModule):
    """What the callbacks need of a module, and nothing else."""

    def __init__(self, family: str = "gpt2", **knobs) -> None:
        super().__init__()
        self.student = tiny_model(family)
        self._teacher = [tiny_model(family)]
        if knobs:
            convert(self.student, SEAConfig(**knobs))
        self.keep_records = False
        self.layer_records = []
        self.recorded_steps = []

    @property
    def teacher(self):
        return self._teacher[0]

    def _step(self, batch):
        if not self.keep_records or not sea_layers(self.student):
            return self.student(**batch).logits.square().mean()
        with AttentionRecorder(self.teacher) as teacher, torch.no_grad():
            self.teacher(**batch)
        with AttentionRecorder(self.student) as student:
            loss = self.student(**batch).logits.square().mean()
        self.layer_records = list(zip(teacher.records, student.records, strict=True))
        self.recorded_steps.append((self.trainer.state.stage.value, self.global_step))
        return loss

    def training_step(self, batch, batch_idx):
        return self._step(batch)

    def validation_step(self, batch, batch_idx):
        self._step(batch)

    def test_step(self, batch, batch_idx):
        self._step(batch)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.layer_records = []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def make_batches(lengths: list[list[int]], width: int, seed: int = 0) -> list[dict]:
    """One batch per inner list, one right-padded item of that many real tokens per number."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for items in lengths:
        tokens = torch.randint(3, VOCABULARY, (len(items), width), generator=generator)
        mask = (torch.arange(width) < torch.tensor(items)[:, None]).long()
        batches.append({"input_ids": tokens, "attention_mask": mask})
    return batches


@pytest.fixture
def distiller():
    return Distiller


@pytest.fixture
def loader():
    """Loads the batches that ``make_batches`` makes, as they are."""
    return lambda lengths, width=48: DataLoader(make_batches(lengths, width), batch_size=None)


@pytest.fixture
def trainer(tmp_path):
    def make(*callbacks, **options):
        defaults = {
            "accelerator": "cpu",
            "callbacks": list(callbacks),
            "default_root_dir": tmp_path,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "max_epochs": 1,
        }
        return Trainer(**{**defaults, **options})

    return make
