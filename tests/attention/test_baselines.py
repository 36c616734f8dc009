"""The baselines: dense formulas, padding, causality, keys per row, and the way through conversion and files."""

import math

import pytest
import torch
from families import tiny_model, token_ids
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

import sea_kernels as ops
from lightning_sea.adapt import convert, load_pretrained, revert, save_pretrained, sea_layers, set_k
from lightning_sea.attention import METHODS, BaselineAttention
from lightning_sea.attention.baselines import cosformer, window
from lightning_sea.calibration import calibrate
from lightning_sea.callbacks.sparsity import layer_sparsity
from lightning_sea.config import SEAConfig
from lightning_sea.recorder import AttentionRecorder
from lightning_sea.tasks.optimization import OptimizerConfig, parameter_groups
from lightning_sea.visualization import attention_maps
from sea_kernels.masks import kept_keys
from sea_kernels.spans import row_spans

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BASELINES = ["performer", "cosformer", "window"]
SCALING = 0.4
MASKS = {
    "none": None,
    "left": [(20, 0), (0, 0)],
    "right": [(0, 48), (0, 3)],
    "both": [(7, 9), (1, 0)],
}


def build(method, *, causal, **knobs):
    torch.manual_seed(0)
    config = SEAConfig(**{"method": method, "k": 8, "horizon": 160, **knobs})
    layer = METHODS[method](config, num_heads=4, num_kv_heads=2, head_dim=8, causal=causal)
    return layer.double().to(DEVICE)


def qkv(queries, keys=None, batch=2):
    """Grouped key heads, float64."""
    generator = torch.Generator().manual_seed(queries)
    shapes = (batch, 4, queries, 8), (batch, 2, keys or queries, 8), (batch, 2, keys or queries, 8)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE) for shape in shapes]


def padding(sides, num_keys):
    if sides is None:
        return None
    place = torch.arange(num_keys)
    return torch.stack([(place >= left) & (place < num_keys - right) for left, right in sides]).to(DEVICE)


def visible(num_keys, causal, mask):
    """bool ``[N, 1, T, T]``: real keys that a real row may see."""
    seen = torch.ones(num_keys, num_keys, dtype=torch.bool, device=DEVICE)
    seen = (seen.tril() if causal else seen)[None, None]
    return seen if mask is None else seen & mask[:, None, None] & mask[:, None, :, None]


def weighted(weights, value):
    """``[N, T, H, D]``: means of the values under ``[N, H, T, T]`` weights; rows without weight give 0."""
    total = weights.sum(-1, keepdim=True)
    mean = weights @ value.repeat_interleave(2, 1) / torch.where(total > 0, total, 1)
    return mean.transpose(1, 2)


def dense_cosformer(query, key, value, *, causal, horizon, mask):
    """The definition, with a T x T matrix of weights."""
    num_keys = key.shape[2]
    place = torch.arange(num_keys, dtype=torch.float64, device=DEVICE)
    reach = num_keys if mask is None else mask.sum(-1)[:, None, None, None]
    decay = torch.cos(math.pi / 2 * (place[:, None] - place) / (horizon if causal else reach))
    scores = query.relu() @ key.relu().repeat_interleave(2, 1).mT
    return weighted(scores * decay * visible(num_keys, causal, mask), value)


@pytest.mark.parametrize("sides", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_keys", [63, 300])  # within one chunk, and over several
def test_cosformer_is_its_definition(num_keys, causal, sides):
    query, key, value = qkv(num_keys)
    mask = padding(sides, num_keys)
    layer = build("cosformer", causal=causal, horizon=310)
    context, estimate = layer(query, key, value, scaling=SCALING, attention_mask=mask)
    assert estimate is None
    expected = dense_cosformer(query, key, value, causal=causal, horizon=310, mask=mask)
    torch.testing.assert_close(context, expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("causal", [True, False])
def test_cosformer_has_the_gradients_of_its_definition(causal, monkeypatch):
    monkeypatch.setattr(cosformer, "CHUNK", 8)  # several chunks, the last not whole
    mask = padding([(0, 2), (5, 0)], 21)
    results = []
    for dense in (False, True):
        inputs = [tensor.requires_grad_() for tensor in qkv(21)]
        if dense:
            context = dense_cosformer(*inputs, causal=causal, horizon=30, mask=mask)
        else:
            context = build("cosformer", causal=causal, horizon=30)(*inputs, scaling=1.0, attention_mask=mask)[0]
        weight = torch.arange(context.numel(), dtype=torch.float64, device=DEVICE).cos().view_as(context)
        results.append(torch.autograd.grad((weight * context).sum(), inputs))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-11, rtol=1e-8)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation returned in one tensor."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returned = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(returned) if isinstance(leaf, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return returned


@pytest.mark.parametrize("causal", [True, False])
def test_no_tensor_of_cosformer_grows_faster_than_its_inputs(causal):
    sizes = []
    for length in (512, 1024):
        inputs = [tensor.requires_grad_() for tensor in qkv(length, batch=1)]
        with LargestTensor() as largest:
            build("cosformer", causal=causal, horizon=1024)(*inputs, scaling=1.0)[0].sum().backward()
        sizes.append(largest.elements)
    assert sizes[1] <= 2 * sizes[0]


def test_cosformer_computes_half_precision_in_float32():
    inputs = qkv(40)
    exact, _ = build("cosformer", causal=True)(*inputs, scaling=1.0)
    half = [tensor.bfloat16() for tensor in inputs]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        context, _ = build("cosformer", causal=True)(*half, scaling=1.0)
    rounded, _ = build("cosformer", causal=True)(*(tensor.double() for tensor in half), scaling=1.0)
    assert context.dtype == torch.bfloat16
    torch.testing.assert_close(context.double(), rounded, atol=0, rtol=2**-8)
    assert (context.double() - exact).norm() < 0.02 * exact.norm()


def test_queries_that_meet_no_key_give_zero_and_finite_gradients():
    query, key, value = (tensor.requires_grad_() for tensor in qkv(5))
    context, _ = build("cosformer", causal=True)(-query.abs(), key, value, scaling=1.0)
    assert not context.any()
    gradients = torch.autograd.grad(context.sum(), (query, key, value))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("sides", [None, MASKS["left"]], ids=["none", "left"])
@pytest.mark.parametrize("causal", [True, False])
def test_performer_is_linear_attention_with_its_own_features(causal, sides):
    query, key, value = qkv(63)
    layer = build("performer", causal=causal, feature_ratio=2.0)
    assert layer.features.projection.shape == (8, 8)  # int(8 ln(8) / 2)
    place = {"causal": causal, "scaling": SCALING, "attention_mask": padding(sides, 63)}
    expected = ops.linear_attention(query, key, value, layer.features.projection, **place)
    del place["causal"]
    context, estimate = layer(query, key, value, **place)
    assert estimate is None
    assert torch.equal(context, expected.transpose(1, 2))
    layer.redraw_projection(torch.Generator().manual_seed(5))
    assert not torch.allclose(layer(query, key, value, **place)[0], context)


def dense_window(row, length, k, causal):
    """The kept keys of one row, counted from the item's first real token."""
    if causal:
        return sorted({*range(min(4, row + 1)), *range(max(0, row + 1 - (k - 4)), row + 1)} | short(row + 1, k))
    width = math.gcd(k, 4)
    begin = row // width - (k - 4) // width // 2
    begin = max(4 // width, min(begin, -(-length // width) - (k - 4) // width)) * width
    return [key for key in [*range(4), *range(begin, begin + k - 4)] if key < length]


def short(length, k):
    return set(range(length)) if length <= k else set()


@pytest.mark.parametrize("sides", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("k", [6, 7, 16])
@pytest.mark.parametrize(("causal", "queries", "keys"), [(True, 63, 63), (True, 5, 63), (True, 1, 63), (False, 63, 63)])
def test_window_is_softmax_over_first_and_near_keys(causal, queries, keys, k, sides):
    query, key, value = qkv(queries, keys)
    mask = padding(sides, keys)
    real = mask if mask is not None else torch.ones(2, keys, dtype=torch.bool)
    keep = torch.zeros(2, 1, keys, keys, dtype=torch.bool, device=DEVICE)
    for item in range(2):
        places = real[item].nonzero()[:, 0].tolist()
        for row, place in enumerate(places):
            keep[item, 0, place, [places[near] for near in dense_window(row, len(places), k, causal)]] = True
    keep = keep[:, :, keys - queries :]
    scores = (SCALING * query @ key.repeat_interleave(2, 1).mT).masked_fill(~keep, -torch.inf)
    expected = weighted(scores.softmax(-1).nan_to_num(0.0), value)
    layer = build("window", causal=causal, k=k)
    context, estimate = layer(query, key, value, scaling=SCALING, attention_mask=mask)
    assert estimate is None
    torch.testing.assert_close(context, expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("sides", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("k", [6, 7, 8, 13, 30])
def test_window_keeps_k_keys_or_all(k, sides):
    mask = padding(sides, 80)
    for causal in (True, False):
        spans = row_spans(2, 80, 80, causal=causal, attention_mask=mask, device=DEVICE)
        choose = window.recent_keys if causal else window.surrounding_keys
        kept = kept_keys(choose(spans, k, 3), spans, 80)
        assert kept.shape == (2, 3, 80, 80)
        missing = spans.length.clamp_max(k)[:, None] - kept.sum(-1)
        if causal:
            assert not missing.any()
            continue
        # only the item's last run can be short, and only of rows that keep it
        last_short = (-spans.length.amax(-1)) % math.gcd(k, 4)
        last = kept.gather(-1, (spans.start + spans.length.amax(-1) - 1)[:, None, None, None].expand(-1, 3, 80, 1))
        long = (spans.length > k)[:, None]
        assert torch.equal(missing, torch.where(last[..., 0] & long, last_short[:, None, None], 0))
        own = torch.arange(80, device=DEVICE)
        assert torch.equal(kept[:, :, own, own], (spans.length > 0)[:, None].expand(-1, 3, -1))


@pytest.fixture
def poisoned_memory():
    """Function after which new tensors hold NaN until something is written to them."""
    yield lambda: torch.use_deterministic_algorithms(True)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("causal", "queries", "k"), [(True, 23, 16), (True, 3, 7), (False, 23, 16), (False, 23, 7)])
def test_window_in_triton_equals_the_reference(causal, queries, k, poisoned_memory):
    pytest.importorskip("triton")
    mask = padding([(2, 0), (0, 4)], 23)
    inputs = [tensor[:, : tensor.shape[1] // 2].float() for tensor in qkv(queries, 23)]  # half of the heads: quicker
    layers = {backend: build("window", causal=causal, k=k, backend=backend) for backend in ("reference", "triton")}
    expected, _ = layers["reference"](*inputs, scaling=SCALING, attention_mask=mask)
    poisoned_memory()
    context, _ = layers["triton"](*inputs, scaling=SCALING, attention_mask=mask)
    torch.testing.assert_close(context, expected, atol=1e-5, rtol=1e-4)


CAUSAL_CHUNKS = 150  # more than one chunk of the linear methods


@pytest.mark.parametrize("method", BASELINES)
def test_no_row_sees_a_later_token(method):
    layer = build(method, causal=True)
    inputs = qkv(CAUSAL_CHUNKS)
    before, _ = layer(*inputs, scaling=SCALING)
    changed = [tensor.clone() for tensor in inputs]
    for tensor in changed:
        tensor[:, :, 139:] += 1.0
    after, _ = layer(*changed, scaling=SCALING)
    assert torch.equal(before[:, :139], after[:, :139])
    assert not torch.isclose(before[:, 139], after[:, 139]).any()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("method", BASELINES)
def test_padding_changes_nothing(method, causal, batch):
    layer = build(method, causal=causal)
    inputs = qkv(111, batch=batch)
    alone, _ = layer(*inputs, scaling=SCALING)
    for left, right in ((9, 0), (0, 9), (4, 5)):
        padded = [torch.nn.functional.pad(tensor, (0, 0, left, right), value=3.0) for tensor in inputs]
        mask = padding([(left, right)] * batch, 120)
        context, _ = layer(*padded, scaling=SCALING, attention_mask=mask)
        torch.testing.assert_close(context[:, left : 120 - right], alone, atol=1e-12, rtol=1e-9)
        assert not context[:, :left].any()
        assert not context[:, 120 - right :].any()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("method", BASELINES)
def test_a_single_token_attends_to_itself(method, causal):
    query, key, value = qkv(1)
    context, _ = build(method, causal=causal)(query, key, value, scaling=SCALING)
    expected = value.repeat_interleave(2, 1).transpose(1, 2)
    if method == "cosformer":  # but for queries and keys that do not meet
        met = (query.relu() * key.relu().repeat_interleave(2, 1)).sum(-1).transpose(1, 2) > 0
        assert met.any()
        context, expected = context[met], expected[met]
    # the published Performer adds 1e-6 to every feature's key sum
    torch.testing.assert_close(context, expected, atol=1e-3 if method == "performer" else 1e-12, rtol=0)


@pytest.mark.parametrize("method", ["performer", "cosformer"])
def test_linear_methods_refuse_a_cache(method):
    layer = build(method, causal=True)
    with pytest.raises(ValueError, match=f"1 queries with 9 keys: method='{method}'.*use_cache=False"):
        layer(*qkv(1, 9), scaling=SCALING)
    model = convert(tiny_model("llama"), SEAConfig(method=method))
    options = {"max_new_tokens": 3, "pad_token_id": 1, "eos_token_id": None}
    with pytest.raises(ValueError, match="use_cache=False"):
        model.generate(token_ids(1, 10), **options)
    assert model.generate(token_ids(1, 10), use_cache=False, **options).shape == (1, 13)


def test_a_short_horizon_is_refused():
    with pytest.raises(ValueError, match="horizon is 30 with 31 keys"):
        build("cosformer", causal=True, horizon=30)(*qkv(31), scaling=SCALING)
    build("cosformer", causal=False, horizon=30)(*qkv(31), scaling=SCALING)  # bidirectional inputs have their own


def test_window_generates_with_a_cache_as_without():
    model = convert(tiny_model("llama"), SEAConfig(method="window", k=8))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    ids = token_ids(2, 20)
    cached = model.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))


def logits(model, ids, mask=None):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


@pytest.mark.parametrize("method", BASELINES)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_models_convert_save_load_and_revert(family, method, tmp_path):
    model, ids = tiny_model(family), token_ids(2, 40)
    dense = logits(model, ids)
    config = SEAConfig(method=method, k=8)
    convert(model, config)
    assert [type(layer) for layer in sea_layers(model)] == [METHODS[method]] * 2
    assert isinstance(sea_layers(model)[0], BaselineAttention)
    found = logits(model, ids)
    assert (found - dense).abs().max() > 1e-3
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path)
    assert loaded.sea_conversion.config == config
    assert torch.equal(logits(loaded, ids), found)
    revert(model)
    assert torch.equal(logits(model, ids), dense)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", BASELINES)
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_models_give_padded_items_the_same_states(family, method, side):
    model = convert(tiny_model(family), SEAConfig(method=method, k=8))
    row = token_ids(1, 37)
    place = slice(0, 37) if side == "right" else slice(4, 41)
    ids, mask = torch.full((1, 41), 1), torch.zeros(1, 41, dtype=torch.long)
    ids[0, place], mask[0, place] = row[0], 1
    with torch.no_grad():
        padded = model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp_min(0)
        ).last_hidden_state
        alone = model.base_model(input_ids=row).last_hidden_state
    torch.testing.assert_close(padded[:, place], alone, atol=2e-4, rtol=2e-4)


def test_a_window_as_long_as_the_input_is_the_dense_model_and_k_changes_it():
    for family in ("bert", "llama"):
        model, ids = tiny_model(family), token_ids(2, 40)
        dense = logits(model, ids)
        convert(model, SEAConfig(method="window", k=40))
        torch.testing.assert_close(logits(model, ids), dense, atol=2e-4, rtol=2e-4)
        set_k(model, 8)
        assert (logits(model, ids) - dense).abs().max() > 1e-3
        with pytest.raises(ValueError, match="k is 5, expected at least 6 with method='window'"):
            set_k(model, 5)


def test_baselines_have_no_estimate_and_no_parameters_of_their_own():
    for method in BASELINES:
        model = convert(tiny_model("llama"), SEAConfig(method=method))
        with AttentionRecorder(model) as recorder:
            logits(model, token_ids(1, 12))
        assert [record.estimate for record in recorder.records] == [None, None]
        assert {group["name"] for group in parameter_groups(model, OptimizerConfig())} == {"base", "base_no_decay"}
        assert all(parameter.requires_grad for parameter in model.parameters())
        buffers = {name for name, _ in model.named_buffers() if ".sea." in name}
        assert len(buffers) == (2 if method == "performer" else 0)


def test_what_needs_an_estimate_refuses_baselines():
    for method in BASELINES:
        model, ids = convert(tiny_model("llama"), SEAConfig(method=method, average_context="far")), token_ids(1, 12)
        with pytest.raises(ValueError, match="convert it with method='sea' and average_context='far'"):
            calibrate(model, [{"input_ids": ids}])
        with pytest.raises(ValueError, match="no estimate to draw: it is dense or of a method other than 'sea'"):
            attention_maps(model, tiny_model("llama"), {"input_ids": ids})
        with AttentionRecorder(model) as recorder:
            logits(model, ids)
        with pytest.raises(ValueError, match="no estimate to count: it is dense or of a method other than 'sea'"):
            layer_sparsity(recorder.records[0], recorder.records[0])


def test_half_precision_models_convert():
    model = AutoModelForCausalLM.from_config(tiny_model("llama").config).bfloat16()
    for method in BASELINES:
        convert(model, SEAConfig(method=method, k=8))
        assert torch.isfinite(logits(model, token_ids(1, 30))).all()
        revert(model)
