"""Conversion of every model family: exactness, invariance to padding, causality, reverting, saving."""

import json

import pytest
import torch
from families import BIDIRECTIONAL, BUILDERS, CAUSAL, tiny_model, token_ids
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, Gemma2Config, Gemma2ForCausalLM, Qwen2Config, Qwen2ForCausalLM

from lightning_sea.adapt import convert, load_pretrained, revert, save_pretrained, sea_layers, set_k
from lightning_sea.config import SEAConfig
from lightning_sea.recorder import AttentionRecorder

SMALL = SEAConfig(k=6, predictor_length=32, first_look_ratio=1, average_context="mean")
CONFIGS = {
    "pooled": SMALL,
    "paper": SEAConfig.paper_opt(k=6, predictor_length=32),
    "heads_compete": SMALL.replace(grouping="causal_batch"),
    "joined": SMALL.replace(decoder="conv", bins="relative"),
    "second_look": SMALL.replace(k=12, first_look_ratio=2),
    "stride": SMALL.replace(query_stride=4),
    "second_look_stride": SMALL.replace(k=12, first_look_ratio=2, query_stride=4),
    "far": SMALL.replace(average_context="far"),
    "far_second_look": SMALL.replace(average_context="far", first_look_ratio=2, second_look_width=1),
    "far_decoder": SMALL.replace(average_context="far", decoder="conv"),
}


def logits(model, ids, mask=None, **options):
    with torch.no_grad():
        return (
            model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits
            if _is_causal(model)
            else model(input_ids=ids, attention_mask=mask).logits
        )


def _is_causal(model):
    return model.config.model_type in CAUSAL


def spread_weights(model, seed=3):
    """Give SEA parameters that start constant some variety, so that tests see every one of them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in sea_layers(model):
            for parameter in layer.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("family", BUILDERS)
def test_keeping_every_key_reproduces_the_dense_model(family):
    model = tiny_model(family)
    ids = token_ids(2, 40)
    dense = logits(model, ids)
    convert(model, SMALL.replace(k=40, average_context="none", gate_bias=40.0))
    torch.testing.assert_close(logits(model, ids), dense, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("ratio", [1, 2])
@pytest.mark.parametrize("family", BUILDERS)
def test_a_far_field_of_single_keys_reproduces_the_dense_model(family, ratio):
    model = tiny_model(family)
    ids = token_ids(2, 40)
    dense = logits(model, ids)
    convert(model, SMALL.replace(k=4, predictor_length=64, average_context="far", first_look_ratio=ratio))
    torch.testing.assert_close(logits(spread_weights(model), ids), dense, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("family", BUILDERS)
def test_keeping_few_keys_changes_the_model_and_revert_restores_it(family):
    model = tiny_model(family)
    ids = token_ids(2, 40)
    dense, names = logits(model, ids), set(model.state_dict())
    implementation = model.config._attn_implementation
    convert(model, SMALL)
    assert len(sea_layers(model)) == 2
    assert (logits(model, ids) - dense).abs().max() > 1e-3
    revert(model)
    assert set(model.state_dict()) == names
    assert model.config._attn_implementation == implementation
    assert torch.equal(logits(model, ids), dense)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("family", ["bert", "opt", "llama"])
def test_padded_equals_unpadded(family, name, side):
    if family in BIDIRECTIONAL and "stride" in name:
        with pytest.raises(ValueError, match="query_stride 4, expected 0 and 1"):
            convert(tiny_model(family), CONFIGS[name])
        return
    model = spread_weights(convert(tiny_model(family), CONFIGS[name]))
    lengths, total = (23, 37), 41
    rows = [token_ids(1, length, seed=length) for length in lengths]
    ids = torch.full((2, total), 1)
    mask = torch.zeros(2, total, dtype=torch.long)
    for item, row in enumerate(rows):
        place = slice(0, row.shape[1]) if side == "right" else slice(total - row.shape[1], total)
        ids[item, place], mask[item, place] = row[0], 1
    options = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)} if family != "opt" else {}
    padded = _hidden(model, ids, mask, **options)
    for item, row in enumerate(rows):
        alone = _hidden(model, row, None)[0]
        torch.testing.assert_close(padded[item][mask[item] == 1], alone, atol=2e-4, rtol=2e-4)


def _hidden(model, ids, mask, **options):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, output_hidden_states=True, **options).hidden_states[-1]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("family", CAUSAL)
def test_no_token_sees_the_future(family, name):
    model = spread_weights(convert(tiny_model(family), CONFIGS[name]))
    ids = token_ids(1, 40)
    changed = ids.clone()
    changed[0, 25] = (changed[0, 25] + 7) % 90 + 3
    before, after = logits(model, ids), logits(model, changed)
    assert torch.equal(before[0, :25], after[0, :25])
    assert not torch.equal(before[0, 25:], after[0, 25:])


@pytest.mark.parametrize("name", ["pooled", "far", "far_second_look"])
@pytest.mark.parametrize("family", CAUSAL)
def test_generation_with_a_cache_equals_generation_without(family, name):
    model = spread_weights(convert(tiny_model(family), CONFIGS[name]))
    ids = token_ids(2, 30)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    cached = model.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))


def test_a_convolutional_estimator_refuses_a_cache():
    model = convert(tiny_model("llama"), CONFIGS["paper"])
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(token_ids(1, 10), max_new_tokens=3, pad_token_id=1)


def test_chosen_layers_only():
    model = tiny_model("llama")
    convert(model, SMALL.replace(k=1), layers=[1])
    ids = token_ids(2, 30)
    with AttentionRecorder(model) as recorder:
        logits(model, ids)
    assert [record.estimate is not None for record in recorder.records] == [False, True]
    reference = tiny_model("llama")
    with AttentionRecorder(reference) as dense:
        logits(reference, ids)
    torch.testing.assert_close(recorder.records[0].context, dense.records[0].context)


def test_recorder_leaves_a_dense_model_as_it_was():
    model = tiny_model("gpt2")
    ids, implementation = token_ids(2, 17), model.config._attn_implementation
    before = logits(model, ids)
    with AttentionRecorder(model) as recorder:
        torch.testing.assert_close(logits(model, ids), before, atol=1e-5, rtol=1e-5)
        with pytest.raises(RuntimeError, match="recorded already"), AttentionRecorder(model):
            pass
    assert len(recorder.records) == 2
    assert recorder.records[0].query.shape == (2, 4, 17, 8)
    assert model.config._attn_implementation == implementation
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_models_load_identically(tmp_path, name):
    model = spread_weights(convert(tiny_model("llama"), CONFIGS[name]))
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert sea_layers(loaded)[0].config == CONFIGS[name]
    ids = token_ids(2, 40)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert not list(tmp_path.glob("*.bin"))


def test_tied_weights_survive_saving(tmp_path):
    model = spread_weights(convert(tiny_model("gpt2"), SMALL))
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    ids = token_ids(1, 12)
    assert torch.equal(logits(loaded, ids), logits(model, ids))


def test_loading_tolerates_the_future_and_refuses_gaps(tmp_path):
    save_pretrained(convert(tiny_model("bert"), SMALL), tmp_path)
    record = json.loads((tmp_path / "sea.json").read_text())
    record["sea"]["knob_of_tomorrow"] = 3
    (tmp_path / "sea.json").write_text(json.dumps(record))
    with pytest.warns(UserWarning, match="knob_of_tomorrow"):
        load_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    dropped = next(name for name in weights if ".sea." in name)
    del weights[dropped]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="knob_of_tomorrow"), pytest.raises(ValueError, match=dropped):
        load_pretrained(tmp_path)


def test_k_changes_without_a_reload():
    model = convert(tiny_model("llama"), SMALL)
    ids = token_ids(1, 60)
    few = logits(model, ids)
    set_k(model, 60)
    many = logits(model, ids)
    set_k(model, SMALL.k)
    assert not torch.allclose(few, many)
    assert torch.equal(logits(model, ids), few)
    with pytest.raises(ValueError, match="k is 0"):
        set_k(model, 0)


def _cross_attention():
    return BertModel(BertConfig(**_tiny(), is_decoder=True, add_cross_attention=True))


def _sliding_window():
    return Qwen2ForCausalLM(
        Qwen2Config(**_tiny(), num_key_value_heads=2, use_sliding_window=True, sliding_window=8, max_window_layers=0)
    )


def _tiny():
    return {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (_cross_attention, "cross-attention"),
        (_sliding_window, "sliding window"),
        (lambda: Gemma2ForCausalLM(Gemma2Config(**_tiny(), num_key_value_heads=2, head_dim=8)), "gemma2"),
        (lambda: convert(tiny_model("bert"), SMALL), "SEA model already"),
    ],
)
def test_models_that_cannot_be_converted_say_why(build, message):
    model = build()
    with pytest.raises(ValueError, match=message):
        convert(model, SMALL)


def test_wrong_arguments_are_named():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"layers is \[5\], expected numbers from 0 to 1"):
        convert(model, SMALL, layers=[5])
    with pytest.raises(ValueError, match="not converted"):
        revert(model)
    with pytest.raises(ValueError, match="grouping is 'head'"):
        convert(model, SMALL.replace(grouping="head"))
    assert not sea_layers(model)


def test_masks_with_gaps_and_packed_sequences_are_refused():
    model = convert(tiny_model("llama"), SMALL)
    ids, mask = token_ids(1, 8), torch.tensor([[1, 1, 0, 0, 1, 1, 1, 1]])
    with pytest.raises(ValueError, match="gaps"):
        logits(model, ids, mask)
    with pytest.raises(ValueError, match="packed"):
        logits(model, ids, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]))
    with pytest.raises(ValueError, match="padding mask"):
        logits(model, ids, torch.ones(1, 1, 8, 8))


@pytest.mark.parametrize("family", BIDIRECTIONAL)
def test_attention_masks_of_ones_change_nothing(family):
    model = spread_weights(convert(tiny_model(family), SMALL))
    ids = token_ids(2, 30)
    assert torch.equal(logits(model, ids), logits(model, ids, torch.ones_like(ids)))
