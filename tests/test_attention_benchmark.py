"""The benchmark of attention layers, with stand-ins for the clock and the GPU: which rows it writes, and from what."""

import json

import attention_forward
import attention_methods
import measure
import pytest
import recorded
import torch
from tiny import WORDS, save_tokenizer
from torch import nn
from torch.nn.attention import SDPBackend
from transformers import LlamaConfig, LlamaForCausalLM

import sea_kernels
from lightning_sea.attention import SEAAttention
from lightning_sea.config import SEAConfig

ERROR_RATIO = attention_forward.error_ratio


@pytest.fixture
def model_dir(tmp_path):
    """Two layers of two heads of 64 over one key head."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, num_key_value_heads=1, vocab_size=len(WORDS), initializer_range=0.3)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    return tmp_path


@pytest.fixture
def no_gpu(monkeypatch):
    blocks = attention_methods._window_blocks
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    monkeypatch.setattr(nn.Module, "cuda", lambda self: self)
    monkeypatch.setattr(attention_methods, "FUSED", {"cudnn": SDPBackend.MATH})
    monkeypatch.setattr(attention_methods, "_compiled_flex_attention", lambda: attention_methods.flex_attention)
    monkeypatch.setattr(attention_methods, "_window_blocks", lambda *sizes: blocks(*sizes[:2], "cpu", sizes[3]))
    monkeypatch.setattr(attention_forward, "FUSED", attention_methods.FUSED)
    monkeypatch.setattr(attention_forward, "smooth", lambda *sizes: measure.smooth(*sizes, device="cpu"))
    monkeypatch.setattr(attention_forward, "error_ratio", lambda *form: 1.0)
    monkeypatch.setattr(attention_forward, "stages_ms", lambda *run: {})
    monkeypatch.setattr(attention_forward, "report_head", dict)

    def took(function, *, graph=False):
        function()
        return {"ms": 2.0, "extra_mib": 1.0}

    monkeypatch.setattr(attention_forward, "time_and_memory", took)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_every_method_has_a_row_at_every_length(no_gpu, model_dir, tmp_path, monkeypatch):
    text, output = tmp_path / "text", tmp_path / "out.json"
    text.write_text(" ".join(WORDS[3:] * 12))
    words = f"x --heads 3 --lengths 128 256 --output {output} --model {model_dir} --text {text}"
    monkeypatch.setattr("sys.argv", words.split())
    monkeypatch.setattr(recorded, "BLOCK", 100)
    monkeypatch.setattr(attention_forward, "BUDGETS_LENGTH", 256)
    attention_forward.main()
    rows = json.loads(output.read_text())["rows"]
    causal = [row for row in rows if row["causal"]]
    assert [row["method"] for row in causal if row["seq_len"] == 256] == [
        "sdpa",
        *["sea", "sea", "sea", "sea", "sea_paper"] * 2,
        "eager",
        "flex_window",
    ]
    assert {row["inputs"] for row in causal} == {"recorded"}
    assert {row["inputs"] for row in rows if not row["causal"]} == {"synthetic"}
    assert all(row["sdpa_ratio"] == 1.0 for row in rows)
    assert {(row["k"], row["query_stride"], row["head_budgets"]) for row in causal if row["method"] == "sea"} == {
        (k, stride, shared) for k in (512, 64) for stride in (1, 4) for shared in (False, True)
    }


def test_heads_get_budgets_from_the_text_and_keep_no_more_keys_together(no_gpu, model_dir, tmp_path, monkeypatch):
    text = tmp_path / "text"
    text.write_text(" ".join(WORDS[3:] * 12))
    monkeypatch.setattr(attention_forward, "BUDGETS_LENGTH", 256)
    source = recorded.Recorded(str(model_dir), text, heads=4)
    layer = SEAAttention(SEAConfig(k=32), num_heads=4, num_kv_heads=4, head_dim=64, causal=True).bfloat16()
    share = attention_forward.shares(layer, source)
    assert share.shape == (4,)
    assert len(set(share.tolist())) > 1
    assert share.mean() <= 1.1


def test_recorded_inputs_are_those_of_the_layers_block_by_block(no_gpu, model_dir, tmp_path, monkeypatch):
    text = tmp_path / "text"
    text.write_text(" ".join(WORDS[3:] * 12))
    monkeypatch.setattr(recorded, "BLOCK", 100)
    source = recorded.Recorded(str(model_dir), text, heads=2)
    assert source.heads == [(0, 0), (1, 0)]
    query, key, value = source.inputs(150)
    assert query.shape == key.shape == value.shape == (1, 2, 150, 64)
    projection = source.model.model.layers[0].self_attn.v_proj
    hidden = source.model.model.layers[0].input_layernorm(source.model.model.embed_tokens(source.ids[:150]))
    torch.testing.assert_close(value[0, 0], projection(hidden), atol=0.02, rtol=0.02)
    assert torch.equal(query[:, :, :100], source.inputs(100)[0])
    with pytest.raises(ValueError, match=r"the text has \d+ tokens, expected at least seq_len = 999"):
        source.inputs(999)


def test_errors_where_rows_keep_nothing(no_gpu, monkeypatch):
    kept = []

    def sparse(query, key, value, mask, *, backend, **place):
        kept.append(sea_kernels.count_keys(mask, num_keys=key.shape[2], causal=False))
        return sea_kernels.sparse_attention(query, key, value, mask, backend="reference", **place)

    monkeypatch.setattr(attention_forward, "sparse_attention", sparse)
    ratio = ERROR_RATIO(SEAConfig.paper_bert(k=4, backend="reference"), False, heads=2, seq_len=200)
    assert (kept[0] == 0).any()
    assert 0 < ratio < 1  # the reference computes in float32


@pytest.mark.parametrize("ratio", [float("nan"), 2.1])
def test_errors_that_are_too_large_or_unknown_stop_the_run(no_gpu, monkeypatch, ratio):
    monkeypatch.setattr(attention_forward, "error_ratio", lambda *form: ratio)
    monkeypatch.setattr("sys.argv", ["x", "--lengths", "128"])
    with pytest.raises(SystemExit, match="its error is too large"):
        attention_forward.main()
