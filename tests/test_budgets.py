"""Heads with budgets of their own: the allocation, what it is good for, and that it stays with the model."""

import itertools

import pytest
import torch
from families import tiny_model, token_ids
from lightning.pytorch import Trainer
from test_calibration import blocks
from tiny import RandomData, save_llama
from transformers import AutoModelForCausalLM

from lightning_sea.adapt import convert, load_pretrained, save_pretrained, sea_layers, set_k
from lightning_sea.budgets import SHARES, allocate, calibrate_budgets, errors_and_keys
from lightning_sea.callbacks import HeadBudgetCalibration
from lightning_sea.config import SEAConfig
from lightning_sea.data.embedded import resolve_model
from lightning_sea.recorder import AttentionRecorder
from lightning_sea.tasks import CausalLMModule
from sea_kernels import count_keys

CONFIG = SEAConfig(k=8, predictor_length=32)


def shares_of(model):
    return torch.stack([layer.budgets.share for layer in sea_layers(model)])


def test_allocation_finds_the_least_error_that_a_search_of_all_finds():
    """Two layers of one head each with convex errors: so few that every pair of shares can be tried."""
    sizes = torch.tensor(SHARES)
    errors = torch.stack([1 / sizes, 0.1 / sizes])[:, None]
    shares = allocate(errors, sizes.expand_as(errors))
    assert shares.shape == (2, 1)
    pairs = [(a, b) for a, b in itertools.product(range(len(SHARES)), repeat=2) if SHARES[a] + SHARES[b] <= 2]
    best = min(pairs, key=lambda pair: float(errors[0, 0, pair[0]] + errors[1, 0, pair[1]]))
    assert shares.flatten().tolist() == [SHARES[index] for index in best]
    assert shares[0] > shares[1]


def test_heads_that_gain_nothing_keep_the_least():
    sizes = torch.tensor(SHARES)
    errors = torch.stack([0 * sizes, 1 / sizes, 1 / sizes])[None]
    assert allocate(errors, sizes.expand_as(errors)).tolist() == [[SHARES[0], 1.5, 1.0]]  # two times 1.5 is too much


def test_what_counts_is_the_keys_that_rows_keep():
    """The first head's rows keep no fewer keys with a small share (their bins are forced): nothing is saved there."""
    sizes = torch.tensor(SHARES)
    errors = torch.stack([0 * sizes, 1 / sizes])[None]
    keys = torch.stack([sizes.clamp_min(1), sizes])[None]
    assert allocate(errors, keys).tolist() == [[SHARES[0], 1.0]]


def test_errors_and_keys_are_those_of_each_head_with_that_share():
    model = convert(tiny_model("llama"), CONFIG)
    layer = sea_layers(model)[0]
    dense = tiny_model("llama")
    with AttentionRecorder(dense) as recorder, torch.no_grad():
        dense(token_ids(1, 200))
    record = recorder.records[0]
    with torch.no_grad():
        errors, keys = errors_and_keys(layer, record)
    assert errors.shape == (layer.num_heads, len(SHARES))
    assert torch.equal(layer.budgets.share, torch.ones(layer.num_heads))
    for index in (0, 5, 9):
        set_k(model, max(1, int(8 * SHARES[index] + 0.5)))
        with torch.no_grad():
            context, estimate = layer(record.query, record.key, record.value, scaling=record.scaling)
        expected = (context - record.context).double().square().sum((0, 1, 3)) / record.context.double().square().sum()
        torch.testing.assert_close(errors[:, index], expected)
        kept = count_keys(estimate.mask, num_keys=200, causal=True)
        assert torch.equal(keys[:, index], kept.sum((0, 2)).double())


@pytest.mark.parametrize(
    ("looks", "most"), [({"k": 32}, 0.8), ({"k": 8, "first_look_ratio": 4}, 0.97)], ids=["one look", "two looks"]
)
def test_budgets_lose_less_at_as_many_keys(looks, most):
    """A trained model, calibrated on one text and measured on another: what each layer does to the contexts.

    After two looks, the keys of the first: the second leaves as many of any.
    """
    model = AutoModelForCausalLM.from_pretrained(resolve_model("embedded:lm")).eval()
    text, other = (blocks(split, 2, 512) for split in ("validation", "train"))
    with AttentionRecorder(model) as recorder, torch.no_grad():
        model(text)
    convert(model, SEAConfig(predictor_length=64, **looks))
    equal = errors_and_keys_of(model, recorder.records)
    calibrate_budgets(model, [{"input_ids": other}])
    assert shares_of(model).unique().numel() > 2
    own = errors_and_keys_of(model, recorder.records)
    assert own[1] < 1.05 * equal[1]
    assert own[0] < most * equal[0]


def errors_and_keys_of(model, records):
    """Relative squared error of all layers' contexts, summed, and the keys that their rows keep in one look."""
    error = keys = 0.0
    for layer, record in zip(sea_layers(model), records, strict=True):
        with torch.no_grad():
            context, estimate = layer(record.query, record.key, record.value, scaling=record.scaling)
        error += float((context - record.context).square().sum() / record.context.square().sum())
        kept = estimate.mask if estimate.coarse is None else estimate.coarse
        keys += float(count_keys(kept, num_keys=record.key.shape[2], causal=True).sum())
    return error, keys


def test_saved_models_and_other_k_keep_the_shares(tmp_path):
    model = convert(tiny_model("llama"), CONFIG).eval()
    for layer in sea_layers(model):
        layer.budgets.assign(torch.linspace(0.5, 1.5, layer.num_heads))
    ids = token_ids(1, 150)
    expected = model(ids).logits
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert torch.equal(shares_of(loaded), shares_of(model))
    torch.testing.assert_close(loaded(ids).logits, expected)
    budgets = sea_layers(loaded)[0].budgets
    before, after = budgets.keys(8), budgets.keys(16)
    assert before[0] == 12
    assert after[0] == 24
    for k, found in ((16, after), (8, before)):
        assert budgets.keys(k)[1] is found[1]  # nothing is copied to a device again, also where k changes to and fro
    budgets.assign(torch.ones_like(budgets.share))
    assert budgets.keys(16) == (16, None)


def test_models_and_batches_without_budgets_are_refused():
    with pytest.raises(ValueError, match="no layer whose heads could have budgets"):
        calibrate_budgets(convert(tiny_model("llama"), CONFIG.replace(decoder="conv")), [])
    with pytest.raises(ValueError, match="no layer whose heads could have budgets"):
        calibrate_budgets(tiny_model("llama"), [])
    with pytest.raises(ValueError, match="batches is empty"):
        calibrate_budgets(convert(tiny_model("llama"), CONFIG), [])
    with pytest.raises(ValueError, match="batches is 0, expected at least 1"):
        HeadBudgetCalibration(batches=0)


def test_training_begins_with_calibrated_budgets_and_a_resumed_one_keeps_them(tmp_path):
    def fit(steps, **options):
        torch.manual_seed(0)
        module = CausalLMModule(save_llama(tmp_path / "model"), sea=SEAConfig(k=4, predictor_length=32))
        settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "limit_val_batches": 0}
        trainer = Trainer(max_steps=steps, callbacks=[HeadBudgetCalibration(2)], default_root_dir=tmp_path, **settings)
        trainer.fit(module, RandomData(causal=True, seq_len=48), **options)
        return trainer, shares_of(module.student)

    trainer, shares = fit(1)
    assert shares.unique().numel() > 1
    for layer in sea_layers(trainer.lightning_module.student):
        layer.budgets.assign(torch.tensor([0.5, 1.5]))
    trainer.save_checkpoint(tmp_path / "with_budgets.ckpt")
    _, resumed = fit(2, ckpt_path=tmp_path / "with_budgets.ckpt")
    assert resumed.tolist() == [[0.5, 1.5]] * 2


@pytest.mark.parametrize("changes", [{"attention": "dense"}, {"sea": SEAConfig(method="window", k=8)}])
def test_other_methods_train_beside_the_callback_without_budgets(tmp_path, changes, caplog):
    module = CausalLMModule(save_llama(tmp_path / "model"), **changes)
    settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "limit_val_batches": 0}
    trainer = Trainer(max_steps=1, callbacks=[HeadBudgetCalibration(2)], default_root_dir=tmp_path, **settings)
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        trainer.fit(module, RandomData(causal=True, seq_len=48))
    assert trainer.global_step == 1
    assert "no layer of the model has budgets" in caplog.text
