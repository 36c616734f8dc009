"""Centres of the far field from a few batches: the right mean, nothing else touched, and what it is good for."""

import copy
import gzip
import json
from itertools import islice

import pytest
import torch
from families import tiny_model, token_ids
from transformers import AutoModelForCausalLM

from lightning_sea.adapt import convert, revert, sea_layers
from lightning_sea.calibration import calibrate
from lightning_sea.config import SEAConfig
from lightning_sea.data.embedded import CORPUS, resolve_model
from lightning_sea.data.tokenizers import load_tokenizer
from lightning_sea.recorder import AttentionRecorder

FAR = SEAConfig(k=6, predictor_length=32, first_look_ratio=1, average_context="far")


def padded(lengths, total):
    """Right-padded token ids of ``lengths`` real tokens."""
    mask = (torch.arange(total) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": token_ids(len(lengths), total), "attention_mask": mask}


def mean_queries(model, batches, skipped):
    """Mean of scaling * query of every layer and head of a dense model; ``skipped(length)`` first tokens left out."""
    queries = {}
    for batch in batches:
        with AttentionRecorder(model) as recorder, torch.no_grad():
            model(**batch)
        for layer, record in enumerate(recorder.records):
            for item, length in enumerate(batch["attention_mask"].sum(-1).tolist()):
                rows = record.scaling * record.query[item, :, skipped(length) : length]
                queries.setdefault(layer, []).append(rows)
    return [torch.cat(rows, 1).mean(1) for rows in queries.values()]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_centres_are_the_mean_queries_of_the_dense_model(family):
    batches = [padded([100, 40], 110), padded([64, 70], 70)]

    def skipped(length):
        return 64 if length > 64 and family == "llama" else 0

    expected = mean_queries(tiny_model(family), batches, skipped)
    model = convert(tiny_model(family), FAR)
    calibrate(model, batches)
    assert len(expected) == len(sea_layers(model)) == 2
    for layer, mean in zip(sea_layers(model), expected, strict=True):
        torch.testing.assert_close(layer.centre.detach(), mean, atol=1e-5, rtol=1e-5)


def test_only_centres_change_and_only_in_converted_layers():
    model = convert(tiny_model("llama"), FAR, layers=[1]).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = sea_layers(model)
    calibrate(model, iter([padded([90], 90)]))
    after = model.state_dict()
    assert list(after) == list(before)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == ["model.layers.1.self_attn.sea.centre"]
    assert sea_layers(model) == layers
    assert model.training
    assert layers[0].centre.grad is None
    assert layers[0].centre.requires_grad


def test_models_and_batches_that_give_no_centre_are_refused():
    with pytest.raises(ValueError, match="no layer with a far field"):
        calibrate(convert(tiny_model("llama"), FAR.replace(average_context="mean")), [padded([9], 9)])
    with pytest.raises(ValueError, match="no layer with a far field"):
        calibrate(tiny_model("llama"), [padded([9], 9)])
    with pytest.raises(ValueError, match="batches hold no token"):
        calibrate(convert(tiny_model("llama"), FAR), [])


def test_conversion_calibrates_with_the_same_random_tokens_every_time():
    torch.manual_seed(1)
    first, state = convert(tiny_model("llama"), FAR), torch.get_rng_state()
    second = convert(tiny_model("llama"), FAR)
    assert torch.equal(state, torch.get_rng_state())
    for one, other in zip(sea_layers(first), sea_layers(second), strict=True):
        assert one.centre.abs().max() > 0
        assert torch.equal(one.centre, other.centre)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_built_on_a_gpu_is_calibrated_there_with_the_same_tokens():
    model = tiny_model("llama")
    expected = convert(copy.deepcopy(model), FAR)
    with torch.device("cuda"):  # as in Lightning's Trainer.init_module
        convert(model.cuda(), FAR)
    for one, other in zip(sea_layers(model), sea_layers(expected), strict=True):
        torch.testing.assert_close(one.centre.cpu(), other.centre, atol=1e-4, rtol=1e-3)


def test_conversion_computes_no_logits(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: pytest.fail("logits were computed"))
    convert(model, FAR)


def test_a_calibrated_far_field_loses_little_without_training():
    """Log perplexity of a trained model on four blocks of 512 tokens, in bins of 8 keys."""
    model = AutoModelForCausalLM.from_pretrained(resolve_model("embedded:lm")).eval()
    text, other = (blocks(split, 4, 512) for split in ("validation", "train"))
    dense = mean_loss(model, text)
    options = {"k": 16, "predictor_length": 64, "first_look_ratio": 1}
    convert(model, SEAConfig(**options, average_context="none", gate_bias=40.0))
    none = mean_loss(model, text)
    revert(model)
    convert(model, SEAConfig(**options, average_context="far"))
    random = mean_loss(model, text)
    calibrate(model, [{"input_ids": other}])
    centred = mean_loss(model, text)
    with torch.no_grad():
        for layer in sea_layers(model):
            layer.centre.zero_()
    plain = mean_loss(model, text)
    assert max(random, centred) < plain < none
    assert max(random, centred) - dense < (none - dense) / 2


def blocks(split, count, length):
    tokenizer = load_tokenizer("embedded:lm")
    with gzip.open(CORPUS / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        text = tokenizer.eos_token.join(json.loads(line)["text"] for line in islice(lines, 60))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][: count * length]
    return torch.tensor(ids).view(count, length)


def mean_loss(model, ids):
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids, use_cache=False).loss)
