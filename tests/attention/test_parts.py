"""The estimator's parts: against the authors' numbers, hand-computed cases and invariants."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from lightning_sea.attention import SEAAttention, rows, sea
from lightning_sea.attention.average import estimated_mean
from lightning_sea.attention.decoder import BidirectionalDecoder, CausalDecoder, twice_as_wide
from lightning_sea.attention.encoder import Encoder
from lightning_sea.attention.features import RandomFeatures, num_features, orthogonal_projection
from lightning_sea.attention.gates import EncodedGates
from lightning_sea.attention.positions import SinusoidPositions, stretched_identity
from lightning_sea.config import SEAConfig
from sea_kernels import mix_average
from sea_kernels.masks import BinMask, pack_bits, unpack_bits
from sea_kernels.spans import row_spans

GOLDEN = ("causal_T20", "bidir_head")


@pytest.fixture(params=GOLDEN)
def golden(request):
    tensors = load_file(f"tests/golden/{request.param}.safetensors")
    tensors["causal"] = request.param.startswith("causal")
    tensors["scaling"] = 1.0 if tensors["causal"] else tensors["q"].shape[-1] ** -0.5
    tensors["valid"] = None if tensors["causal"] else tensors["mask"][:, 0, 0].bool()
    return tensors


def spans_of(golden):
    batch, _, rows, _ = golden["q"].shape
    return row_spans(batch, rows, rows, causal=golden["causal"], attention_mask=golden["valid"])


def test_encoder_and_gates_match_the_authors(golden):
    head_dim = golden["q"].shape[-1]
    encoder, gates = Encoder(head_dim), EncodedGates(head_dim, 2, 3.0)
    encoder.linear.load_state_dict(_weights(golden, "attention_predictor_enc.0"))
    encoder.norm.load_state_dict(_weights(golden, "attention_predictor_enc.1"))
    gates.linear.load_state_dict(_weights(golden, "attention_predictor_dec_scaler.0"))
    encoded = encoder(golden["performer_context_layer"], golden["v"])
    real = spans_of(golden).length > 0
    rows = real[:, None].expand(-1, encoded.shape[1], -1)
    torch.testing.assert_close(encoded[rows], golden["t_attention_predictor"][rows], atol=1e-5, rtol=1e-5)
    expected = golden["estimated_scales"].sigmoid().movedim(-1, 0)
    torch.testing.assert_close(gates(encoded)[:, rows], expected[:, rows], atol=1e-5, rtol=1e-5)


def _weights(golden, name):
    return {key: golden[f"w.{name}.{key}"] for key in ("weight", "bias")}


def test_average_context_matches_the_authors(golden):
    value, expected = golden["v"], golden["average_context_layer"]
    spans = spans_of(golden)
    if golden["causal"]:
        nothing = torch.zeros(value.shape[:3])
        torch.testing.assert_close(mix_average(value, value, nothing), expected, atol=1e-5, rtol=1e-5)
        return
    # the authors' weights are not normalised: ours are theirs divided by their sum
    ours = estimated_mean(value, golden["estimated_attention_probs"], spans, "relative", 0)
    ones = torch.ones_like(value)
    direction = F.cosine_similarity(ours, expected, dim=-1)
    torch.testing.assert_close(direction, torch.ones_like(direction), atol=1e-5, rtol=0)
    constant = estimated_mean(ones, golden["estimated_attention_probs"], spans, "relative", 0)
    torch.testing.assert_close(constant, torch.ones_like(constant), atol=1e-5, rtol=0)


def test_the_whole_output_matches_the_authors_given_their_estimate(golden, monkeypatch):
    """Sparse attention, average, mix (bidirectional: the selection too) in our forward, from their scores and gates."""
    head_dim, num_heads = golden["q"].shape[-1], golden["q"].shape[1]
    grouping, k = ("causal_batch", 4) if golden["causal"] else ("head", 7)
    config = SEAConfig.paper_opt(k=k, predictor_length=32, grouping=grouping)
    layer = SEAAttention(
        config, num_heads=num_heads, num_kv_heads=num_heads, head_dim=head_dim, causal=golden["causal"]
    ).eval()
    layer._scores = lambda *_: golden["estimated_attention_score"]
    layer.gates.forward = lambda _: golden["estimated_scales"].sigmoid().movedim(-1, 0)
    if golden["causal"]:  # four neighbouring bins tie there, and ties are broken in another order
        bits = pack_bits(golden["partial_attention_mask_before_interp"] > -1)
        layer._select_from_scores = lambda *_, **__: BinMask(bits, 32, "relative")
    else:  # ours normalises the average's weights on purpose
        real = (spans_of(golden).length > 0)[:, None, :, None]
        monkeypatch.setattr(sea, "estimated_mean", lambda *_: golden["average_context_layer"] * real)
    context, _ = layer(golden["q"], golden["k"], golden["v"], scaling=golden["scaling"], attention_mask=golden["valid"])
    real = spans_of(golden).length > 0
    torch.testing.assert_close(context.flatten(2)[real], golden["context"][real], atol=1e-5, rtol=1e-5)


def test_stretched_identity_matches_the_authors():
    golden = load_file("tests/golden/bidir_head.safetensors")
    valid = golden["mask"][:, 0, 0].bool()
    spans = row_spans(*valid.shape[:1], 50, 50, causal=False, attention_mask=valid)
    ours = stretched_identity(50, 16, spans, valid.sum(-1))
    theirs = golden["v_for_atten"][:, 0, :, :16]
    torch.testing.assert_close(ours[valid], theirs[valid], atol=1e-5, rtol=1e-5)


def test_stretched_identity_by_hand():
    spans = row_spans(1, 5, 5, causal=False, attention_mask=torch.tensor([[0, 1, 1, 1, 1]]))
    expected = torch.tensor([[0, 0, 0], [1, 0, 0], [1 / 3, 2 / 3, 0], [0, 2 / 3, 1 / 3], [0, 0, 1]])
    torch.testing.assert_close(stretched_identity(5, 3, spans, torch.tensor([4]))[0], expected)


def test_sinusoid_positions_do_not_end_and_do_not_depend_on_padding():
    positions = SinusoidPositions(16, 1e4)
    far = positions(100_000, torch.tensor([0]))[0]
    assert far[-1000:].std() > 0.5
    shifted = positions(50, torch.tensor([7]))[0]
    torch.testing.assert_close(shifted[7:], far[:43])


def test_projection_rows_are_orthogonal_with_gaussian_norms():
    projection = orthogonal_projection(20, 8, torch.Generator().manual_seed(0))
    gram = projection[:8] @ projection[:8].T
    torch.testing.assert_close(gram, torch.diag(gram.diagonal()), atol=1e-4, rtol=0)
    many = orthogonal_projection(4096, 8, torch.Generator().manual_seed(0))
    assert many.square().sum(1).mean() == pytest.approx(8, rel=0.05)
    assert num_features(64, 1.0) == 266


def test_redrawing_is_seeded_and_keeps_the_buffer():
    features = RandomFeatures(8, 1.0)
    before, place = features.projection.clone(), features.projection.data_ptr()
    features.redraw(torch.Generator().manual_seed(5))
    first = features.projection.clone()
    features.redraw(torch.Generator().manual_seed(5))
    assert not torch.equal(first, before)
    assert torch.equal(features.projection, first)
    assert features.projection.data_ptr() == place
    assert "projection" in features.state_dict()


def test_nearest_upsampling_commutes_with_the_last_convolution():
    """The paper upsamples, then mixes channels; ours mixes at a quarter of the width."""
    torch.manual_seed(0)
    decoder = CausalDecoder(2, 8, 32, subpixel=False, pooled=False)
    kept = {}
    decoder.mix.register_forward_hook(lambda _, inputs, __: kept.update(image=inputs[0]))
    scores = decoder(torch.randn(1, 2, 9, 16), None, torch.ones(1, 9).bool(), torch.zeros(1).long())
    upsampled = F.interpolate(kept["image"], scale_factor=(1.0, 4.0), mode="nearest")
    torch.testing.assert_close(scores, decoder.out_norm(decoder.mix(upsampled)))


def test_subpixel_decoder_gives_every_bin_its_own_score():
    torch.manual_seed(0)
    arguments = (torch.randn(1, 2, 9, 16), None, torch.ones(1, 9).bool(), torch.zeros(1).long())
    nearest = CausalDecoder(2, 8, 32, subpixel=False, pooled=False)(*arguments)
    subpixel = CausalDecoder(2, 8, 32, subpixel=True, pooled=False)(*arguments)
    assert nearest.unflatten(-1, (-1, 4)).std(-1).max() < 1e-6
    assert subpixel.unflatten(-1, (-1, 4)).std(-1).min() > 1e-3


@pytest.mark.parametrize("kind", [CausalDecoder, BidirectionalDecoder])
def test_pooled_decoders_start_as_no_correction(kind):
    options = {"subpixel": True} if kind is CausalDecoder else {}
    decoder = kind(2, 8, 32, pooled=True, **options)
    pooled = torch.randn(1, 2, 9, 32)
    scores = decoder(torch.randn(1, 2, 9, 16), pooled, torch.ones(1, 9).bool(), torch.zeros(1).long())
    assert scores.shape == (1, 2, 9, 32)
    assert not scores.any()


@pytest.mark.parametrize("width", [1, 2, 16])
def test_columns_are_interpolated_as_by_torch(width):
    scores = torch.randn(2, 3, 5, width, dtype=torch.float64, requires_grad=True)
    wide = F.interpolate(scores.flatten(1, 2), scale_factor=2.0, mode="linear", align_corners=False)
    wide, own = wide.unflatten(1, (3, 5)), twice_as_wide(scores)
    torch.testing.assert_close(own, wide)
    grad = torch.randn_like(wide)
    torch.testing.assert_close(*(torch.autograd.grad(x, scores, grad)[0] for x in (own, wide)))


@pytest.mark.parametrize("decoder", ["none", "conv"])
@pytest.mark.parametrize("pooling", ["none", "mean", "mean_bound"])
@pytest.mark.parametrize("average", ["mean", "far"])
@pytest.mark.parametrize("causal", [False, True])
def test_every_parameter_is_used(decoder, pooling, causal, average):
    """DDP runs without a search for unused parameters."""
    if decoder == pooling == "none":
        return
    options = {"decoder": decoder, "pooling": pooling, "average_context": average}
    config = SEAConfig(k=4, predictor_length=32, first_look_ratio=1, **options)
    layer = SEAAttention(config, num_heads=4, num_kv_heads=2, head_dim=8, causal=causal)
    query, key, value = torch.randn(2, 4, 20, 8), torch.randn(2, 2, 20, 8), torch.randn(2, 2, 20, 8)
    context, estimate = layer(query, key, value, scaling=0.3)
    (context.square().sum() + estimate.scores.square().sum()).backward()
    unused = [name for name, parameter in layer.named_parameters() if parameter.grad is None]
    assert not unused


@pytest.mark.parametrize("average", ["mean", "far"])
@pytest.mark.parametrize("causal", [False, True])
def test_scores_that_nobody_asks_for_change_nothing(causal, average):
    config = SEAConfig(k=4, predictor_length=32, average_context=average)
    layer = SEAAttention(config, num_heads=4, num_kv_heads=2, head_dim=8, causal=causal)
    query, key, value = torch.randn(2, 4, 50, 8), torch.randn(2, 2, 50, 8), torch.randn(2, 2, 50, 8)
    context, estimate = layer(query, key, value, scaling=0.3)
    without, bare = layer(query, key, value, scaling=0.3, with_scores=False)
    assert torch.equal(context, without)
    assert estimate.scores is not None
    assert (bare.scores is None) == (causal or average == "far")  # the bidirectional average needs them


@pytest.mark.parametrize("causal", [True, False])
def test_lengths_are_those_of_spans_and_only_built_when_asked_for(causal, monkeypatch):
    layer = SEAAttention(SEAConfig(predictor_length=32), num_heads=2, num_kv_heads=2, head_dim=8, causal=causal)
    mask = torch.arange(12) < torch.tensor([[7], [12]])
    expected = row_spans(2, 12, 12, causal=causal, attention_mask=mask).length

    def refuse(*arguments, **options):
        raise AssertionError("spans are built")

    monkeypatch.setattr(sea, "row_spans", refuse)
    _, estimate = layer(*torch.randn(3, 2, 2, 12, 8), scaling=0.3, attention_mask=mask)
    assert torch.equal(estimate.length, expected)


def test_jitter_moves_edges_in_training_only():
    config = SEAConfig.paper_opt(k=4, predictor_length=32, jitter_probability=1.0)
    layer = SEAAttention(config, num_heads=2, num_kv_heads=2, head_dim=8, causal=True)
    torch.manual_seed(0)
    shifts = {layer._draw_shift() for _ in range(50)}
    assert len(shifts) > 30
    assert max(map(abs, shifts)) <= 192
    layer.eval()
    assert layer._draw_shift() == 0


@pytest.mark.parametrize("grouping", ["query", "causal_batch"])
@pytest.mark.parametrize("stride", [2, 8])
def test_rows_of_a_stride_share_the_first_rows_bins(stride, grouping):
    config = SEAConfig(k=8, predictor_length=32, query_stride=stride, first_look_ratio=1, grouping=grouping)
    layer = SEAAttention(config, num_heads=2, num_kv_heads=2, head_dim=8, causal=True)
    tensors = [torch.randn(1, 2, 64, 8) for _ in range(3)]
    shared = layer.estimate(*tensors, scaling=0.3).mask
    layer.config = config.replace(query_stride=1)
    alone = layer.estimate(*tensors, scaling=0.3).mask
    assert isinstance(shared, BinMask)
    leader = torch.arange(64) // stride * stride
    assert torch.equal(shared.bits & alone.bits[:, :, leader], alone.bits[:, :, leader])
    extra = unpack_bits(shared.bits ^ alone.bits[:, :, leader], 32).sum(-1)
    assert (extra <= torch.arange(64) - leader).all()  # at most the keys since the group began


def estimator(**options):
    """A causal layer with convolutions in float64, where no rounding decides between bins, and inputs for it."""
    torch.manual_seed(0)
    options = {"k": 6, "predictor_length": 32, "decoder": "conv", "first_look_ratio": 1} | options
    layer = SEAAttention(SEAConfig(**options), num_heads=4, num_kv_heads=2, head_dim=8, causal=True).double().eval()
    if options.get("pooling") != "none":
        torch.nn.init.ones_(layer.decoder.out_norm.weight)  # else the decoder says nothing at first
    return layer, [torch.randn(3, heads, 70, 8, dtype=torch.float64) for heads in (4, 2, 2)]


def padding_on_both_sides():
    place = torch.arange(70)
    return torch.stack([place >= 0, place >= 33, (place >= 5) & (place < 50)])


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {
            "pooling": "none",
            "grouping": "causal_batch",
            "bins": "relative",
            "upsampling": "nearest",
            "average_context": "mean",
        },
        {"pooling": "mean_bound", "first_look_ratio": 2},
        {"pooling": "mean", "query_stride": 2, "average_context": "none"},
        {"pooling": "none", "query_stride": 4, "grouping": "causal_batch"},
    ],
)
@torch.no_grad()
def test_chunks_of_rows_estimate_what_all_rows_together_do(monkeypatch, options, masked):
    layer, inputs = estimator(**options)
    place = {"scaling": 0.4, "attention_mask": padding_on_both_sides() if masked else None}
    context, whole = layer(*inputs, **place)
    monkeypatch.setattr(rows, "CHUNK_SCORES", 1)
    monkeypatch.setattr(rows, "LEAST_ROWS", 11)
    calls = []
    layer.decoder.register_forward_hook(lambda *_: calls.append(1))
    chunked_context, chunked = layer(*inputs, with_scores=False, **place)
    assert len(calls) == 7
    assert chunked.scores is None
    first, second = (estimate.mask if estimate.coarse is None else estimate.coarse for estimate in (whole, chunked))
    assert torch.equal(first.bits, second.bits)
    torch.testing.assert_close(chunked_context, context)


def test_gradients_are_not_chunked(monkeypatch):
    layer, inputs = estimator()
    monkeypatch.setattr(rows, "LEAST_ROWS", 1)
    monkeypatch.setattr(rows, "CHUNK_SCORES", 1)
    calls = []
    layer.decoder.register_forward_hook(lambda *_: calls.append(1))
    layer(*inputs, scaling=0.4, with_scores=False)
    assert len(calls) == 1


@pytest.mark.parametrize("pooled", [True, False])
def test_rows_decoded_alone_are_those_decoded_together(pooled):
    torch.manual_seed(0)
    decoder = CausalDecoder(2, 8, 32, subpixel=True, pooled=pooled).double()
    torch.nn.init.ones_(decoder.out_norm.weight)
    encoded, scores = torch.randn(2, 2, 30, 16).double(), torch.randn(2, 2, 30, 32).double()
    real = torch.stack([torch.ones(30), torch.arange(30) >= 9]).bool()
    chosen = torch.tensor([[0, 3, 8, 29], [9, 11, 12, 29]])
    arguments = encoded, scores if pooled else None, real, torch.tensor([0, 9])
    expected = decoder(*arguments).gather(2, chosen[:, None, :, None].expand(-1, 2, -1, 32))
    torch.testing.assert_close(decoder(*arguments, chosen), expected)


@pytest.mark.parametrize("first", [0, 3, 8])
def test_leading_rows_by_hand(first):
    mask = torch.tensor([[1] * 16, [0] * 5 + [1] * 11])
    spans = rows.spans_of_rows(row_spans(2, 16, 16, causal=True, attention_mask=mask), slice(first, 16))
    leaders, place = rows.leading_rows(spans, 4)
    for item, start in enumerate((0, 5)):
        for row in range(max(first, start), 16):
            leader = start + (row - start) // 4 * 4
            if leader >= first:
                assert leaders[item, place[item, row - first]] + first == leader


@pytest.mark.parametrize("kind", [CausalDecoder, BidirectionalDecoder])
def test_convolutions_see_half_precision_in_channels_last_under_autocast(kind):
    options = {"subpixel": True} if kind is CausalDecoder else {}
    decoder = kind(2, 8, 32, pooled=True, **options)
    seen = []
    for convolution in (decoder.first, decoder.second):
        convolution.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    pooled, encoded = torch.randn(1, 2, 9, 32), torch.randn(1, 2, 9, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decoder(encoded, pooled, torch.ones(1, 9).bool(), torch.zeros(1).long())
    assert len(seen) == 2
    for image in seen:
        assert image.dtype == torch.bfloat16
        assert image.is_contiguous(memory_format=torch.channels_last)
