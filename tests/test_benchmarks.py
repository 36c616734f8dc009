"""The benchmark of distillation steps without a GPU: its dense losses, its checks, its memory accounting, its rows."""

import json
from dataclasses import replace

import dense_distillation as dense
import distillation_checks as checks
import distillation_step as step
import pytest
import torch
from torch.nn import functional as F

from lightning_sea import distillation
from lightning_sea.attention import SEAAttention
from lightning_sea.config import SEAConfig
from lightning_sea.recorder import LayerRecord

CONFIG = SEAConfig(k=8, predictor_length=32, first_look_ratio=2)


def small_layer(seq_len=63, heads=2, groups=1, dtype=torch.float64, config=CONFIG):
    """What ``layer_inputs`` gives, on the CPU."""
    torch.manual_seed(0)
    layer = SEAAttention(config, num_heads=heads, num_kv_heads=groups, head_dim=16, causal=True)
    shapes = [(1, count, seq_len, 16) for count in (heads, groups, groups)]
    query, key, value = (torch.randn(shape, dtype=dtype) for shape in shapes)
    context = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)
    teacher = LayerRecord(query, key, value, context, 0.25, None, True, None)
    inputs = [(x + 0.1 * torch.randn_like(x)).requires_grad_() for x in (query, key, value)]
    return layer.to(torch.float64 if dtype == torch.float64 else torch.float32), teacher, inputs


@pytest.fixture
def fake_device(monkeypatch):
    """Counters that stand for a GPU's memory: each synchronisation sees what the test has put there."""
    memory = {"now": 0, "peak": 0}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: memory.update(peak=memory["now"]))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: memory["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: memory["peak"])
    return memory


@pytest.mark.parametrize("bins", ["aligned", "relative"])
def test_dense_losses_and_gradients_are_those_of_linear_memory(bins):
    far = "far" if bins == "aligned" else "none"
    config = CONFIG.replace(bins=bins, average_context=far, first_look_ratio=2 if bins == "aligned" else 1)
    layer, teacher, inputs = small_layer(config=config)
    estimate = replace(layer.estimate(*inputs, scaling=0.25), shift=-100 if bins == "relative" else 0)
    student = replace(teacher, query=inputs[0], key=inputs[1])
    for name, arguments in (("estimation_losses", (teacher, estimate)), ("attention_losses", (teacher, student))):
        linear = getattr(distillation, name)(*arguments)
        maps = getattr(dense, name)(*arguments, dtype=torch.float64)
        assert linear.keys() == maps.keys()
        for loss in linear:
            torch.testing.assert_close(maps[loss], linear[loss])
            grads = [torch.autograd.grad(form[loss], inputs[:2], retain_graph=True) for form in (maps, linear)]
            assert grads[0][0].abs().sum() > 0
            torch.testing.assert_close(*grads)


def test_a_dense_step_differs_in_the_form_of_its_losses_alone(monkeypatch):
    layer, teacher, inputs = small_layer(dtype=torch.float32)
    seen = []
    original = dense.log_map
    monkeypatch.setattr(dense, "log_map", lambda *arguments: seen.append(1) or original(*arguments))
    grads = step.layer_step(layer, teacher, inputs, "sea")
    assert len(grads) == 3 + len(list(layer.parameters()))
    assert not seen
    torch.testing.assert_close(step.layer_step(layer, teacher, inputs, "sea_dense"), grads, rtol=1e-3, atol=1e-7)
    assert seen
    seen.clear()
    step.layer_step(layer, teacher, inputs, "sea")  # the swap ends with the step
    assert not seen


def test_checks_pass_for_the_reference_and_fail_for_a_wrong_gradient(monkeypatch):
    layer, teacher, inputs = small_layer(dtype=torch.bfloat16)
    found = checks.gradient_checks(layer, teacher, inputs)
    assert set(found) == {"sparse_attention", "far_field_attention", "estimation_loss", "attention_loss"}
    for name, check in found.items():
        # computed in float32, the reference is never worse than bfloat16 throughout
        assert 0 < check["error_ratio"] < 1, name
        assert check["repeats"], name

    original = distillation.ops.attention_loss

    def wrong(*arguments, **options):
        divergence, square_error = original(*arguments, **options)
        exact = arguments[0].dtype == torch.float64
        return divergence * (1 if exact else 1.1 + torch.rand(())), square_error

    monkeypatch.setattr(distillation.ops, "attention_loss", wrong)
    check = checks.gradient_checks(layer, teacher, inputs)["attention_loss"]
    assert check["error_ratio"] > step.LARGEST_ERROR_RATIO
    assert not check["repeats"]


def test_single_operations_give_their_gradients():
    layer, teacher, inputs = small_layer(dtype=torch.float32, groups=2)
    steps = step.operation_steps(layer, teacher, inputs)
    assert tuple(steps) == step.OPERATIONS
    shapes = [tuple(x.shape) for x in inputs]
    assert [tuple(x.shape) for x in steps["sparse_attention"]()] == shapes
    assert [tuple(x.shape) for x in steps["far_field_attention"]()] == [*shapes, (2, 16)]
    losses = distillation.attention_losses(teacher, replace(teacher, query=inputs[0], key=inputs[1]))
    expected = torch.autograd.grad(0.1 * losses["attn_kl"] + losses["attn_mse"], inputs[:2])
    torch.testing.assert_close(steps["attention_losses"](), expected)
    assert [tuple(x.shape) for x in steps["estimation_losses"]()] == [(1, 2, 63, 32)]


def test_memory_is_counted_above_what_was_there(fake_device, monkeypatch):
    fake_device["now"] = 50 << 20
    monkeypatch.setattr(step, "median_ms", lambda run, **_: run() or 1.23456)
    numbers = step.measured(lambda: fake_device.update(peak=57 << 20))
    assert numbers == {"ms": 1.235, "peak_mib": 7.0}


def test_after_memory_has_run_out_a_method_is_not_tried_again(fake_device):
    tried = []

    def fail():
        tried.append(1)
        raise torch.OutOfMemoryError

    attempt = step.UntilMemoryEnds()
    nothing = {"ms": None, "peak_mib": None}
    assert attempt("sea_dense", fail) == nothing
    assert attempt("sea_dense", fail) == nothing
    assert attempt("sea", lambda: {"ms": 1.0, "peak_mib": 2.0}) == {"ms": 1.0, "peak_mib": 2.0}
    assert len(tried) == 1
    with pytest.raises(RuntimeError, match="something else"):
        attempt("sea", lambda: (_ for _ in ()).throw(RuntimeError("something else")))


def test_rows_of_a_layer(fake_device, monkeypatch):
    times = iter([4.0, 2.0, 8.0, None, 1.0])

    def measured(run):
        ms = next(times)
        if ms is None:
            raise torch.OutOfMemoryError
        return {"ms": ms, "peak_mib": 10 * ms}

    monkeypatch.setattr(step, "measured", measured)
    monkeypatch.setattr(
        step, "layer_inputs", lambda heads, seq_len, *_: small_layer(seq_len, heads, heads, torch.float32)
    )
    attempt = step.UntilMemoryEnds()
    methods = ["sea", "sea_dense", "sdpa", "sparse_attention"]
    rows = {row["method"]: row for row in step.layer_rows(2, 20, "default", methods, None, attempt)}
    assert list(rows) == methods
    common = {"model": "layer", "heads": 2, "seq_len": 20, "inputs": "synthetic"}
    assert rows["sea"] == {"method": "sea", **common, "ms": 8.0, "peak_mib": 80.0, "sdpa_ratio": 0.25}
    assert rows["sea_dense"] == {"method": "sea_dense", **common, "ms": None, "peak_mib": None, "sdpa_ratio": None}
    assert (rows["sdpa"]["ms"], rows["sdpa"]["backend"], rows["sdpa"]["sdpa_ratio"]) == (2.0, "cudnn", 1.0)
    assert rows["sparse_attention"]["sdpa_ratio"] == 2.0


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_rows_of_a_model(fake_device, monkeypatch, gradient_checkpointing):
    sizes = {"vocab_size": 31, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2}
    for name, value in {**sizes, "num_attention_heads": 2}.items():
        monkeypatch.setitem(step.MODEL, name, value)
    used = []
    original = dense.estimation_rows
    monkeypatch.setattr(dense, "estimation_rows", lambda *arguments: used.append(1) or original(*arguments))
    rows = []
    for row in step.model_rows(
        [12, 17], "two_looks", ["sea", "sea_dense", "sdpa"], gradient_checkpointing=gradient_checkpointing
    ):
        row["dense_losses"] = len(used)
        rows.append(row)
        used.clear()
    assert [(row["method"], row["seq_len"]) for row in rows] == [
        (method, seq_len) for seq_len in (12, 17) for method in ("sea", "sea_dense", "sdpa")
    ]
    for row in rows:
        assert row["ms"] > 0
        assert row["model"] == "llama-125m"
        assert row["gradient_checkpointing"] is gradient_checkpointing
        steps = step.WARM_UP_STEPS + step.MEASURED_STEPS
        assert row["dense_losses"] == (2 * steps if row["method"] == "sea_dense" else 0)


def test_the_meter_leaves_the_first_steps_out(fake_device):
    meter = step.StepMeter()
    for now, peak in ((1, 90), (20, 30), (20, 50), (30, 45)):
        fake_device["now"] = now << 20
        meter.on_train_batch_start(None, None, None, 0)
        fake_device["peak"] = peak << 20
        meter.on_train_batch_end(None, None, None, None, 0)
    assert meter.numbers(1)["peak_mib"] == 30.0
    assert meter.numbers(1)["ms"] >= 0


def test_a_table_has_a_line_per_length_and_a_column_per_method():
    rows = [
        {"method": "sea", "model": "layer", "heads": 2, "seq_len": 1024, "ms": 1.5, "peak_mib": 20.0},
        {"method": "sdpa", "model": "layer", "heads": 2, "seq_len": 1024, "ms": 1.0, "peak_mib": 10.0},
        {"method": "sea", "model": "layer", "heads": 2, "seq_len": 2048, "ms": None, "peak_mib": None},
    ]
    heading, first, second = step.table(rows).splitlines()
    assert heading.split("  ")[-1].strip() == "sdpa (ms, MiB)"
    assert first.split() == ["layer", "2", "1024", "1.50", "20", "1.00", "10"]
    assert second.split() == ["layer", "2", "2048", "out", "of", "memory", "-"]


def test_the_report_is_written_row_by_row(monkeypatch, tmp_path):
    class Killed(Exception):
        pass

    def rows(heads, seq_len, form, methods, recorded, attempt):
        assert recorded is None
        assert form == "two_looks"
        assert methods == ["sea", "sparse_attention"]
        if seq_len == 2048:
            raise Killed
        yield {"method": "sea", "model": "layer", "heads": heads, "seq_len": seq_len, "ms": 1.0, "peak_mib": 2.0}

    monkeypatch.setattr(step, "report_head", lambda: {"device": "some"})
    monkeypatch.setattr(step, "checked_gradients", lambda form: {})
    monkeypatch.setattr(step, "layer_rows", rows)
    output = tmp_path / "folder" / "step.json"
    arguments = [
        "--output",
        str(output),
        "--form",
        "two_looks",
        "--heads",
        "4",
        "--methods",
        "sea",
        "--operations",
        "sparse_attention",
    ]
    with pytest.raises(Killed):
        step.main([*arguments, "--lengths", "1024", "2048"])
    report = json.loads(output.read_text())
    assert report["device"] == "some"
    assert [row["seq_len"] for row in report["rows"]] == [1024]
    for length in ("512", "1024"):
        step.main([*arguments, "--lengths", length, "--model-lengths"])
    report = json.loads(output.read_text())
    assert [row["seq_len"] for row in report["rows"]] == [512, 1024], (
        "rows of other lengths stay, those of this one do not"
    )
    assert {row["device"] for row in report["rows"]} == {"some"}
