"""Linear attention against the quadratic formula, the published numbers and another library's random features."""

import pytest
import torch
from performer_pytorch.performer_pytorch import causal_linear_attention_noncuda, generalized_kernel, softmax_kernel
from performer_pytorch.performer_pytorch import linear_attention as performer_attention

from sea_kernels import LinearState, linear_attention
from sea_kernels.linear_attention import reference

FEATURES = 6


@pytest.fixture
def projection():
    return torch.randn(FEATURES, 5, generator=torch.Generator().manual_seed(1))


def naive(query, key, value, projection, *, causal, scaling=1.0, attention_mask=None):
    """The definition with a T x S weight matrix and a loop over items, on real keys only."""
    projection = projection.double() * query.shape[-1] ** -0.25
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    output = query.new_zeros(*query.shape[:3], value.shape[-1])
    for item in range(query.shape[0]):
        real = torch.ones(key.shape[2], dtype=torch.bool) if attention_mask is None else attention_mask[item] != 0
        q, k, v = query[item][:, real[-query.shape[2] :]], key[item][:, real], value[item][:, real]
        if causal:
            q, k = ((x @ projection.T).relu() + 1e-3 for x in (scaling * q, k))
            weights = (q @ k.mT).tril(k.shape[1] - q.shape[1])
            total = weights.sum(-1, keepdim=True) + 1e-6 * q.sum(-1, keepdim=True)
        else:
            raw = [(x @ projection.T, x.square().sum(-1, keepdim=True) / (2 * x.shape[-1] ** 0.5)) for x in (q, k)]
            q = ((raw[0][0] - raw[0][1] - raw[0][0].amax(-1, keepdim=True)).exp() + 1e-4) / FEATURES**0.5
            k = ((raw[1][0] - raw[1][1] - raw[1][0].amax((-2, -1), keepdim=True)).exp() + 1e-4) / FEATURES**0.5
            weights = q @ k.mT
            total = weights.sum(-1, keepdim=True)
        output[item, :, real[-query.shape[2] :]] = weights @ v / total
    return output


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("length", [1, 63, 111, 300])
def test_equals_the_quadratic_formula(random_qkv, projection, causal, length):
    query, key, value = random_qkv(queries=length)
    output = linear_attention(query, key, value, projection, causal=causal, scaling=0.4)
    expected = naive(query, key, value, projection, causal=causal, scaling=0.4)
    torch.testing.assert_close(output, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("sides", [[(0, 9), (0, 0)], [(9, 0), (141, 0)], [(3, 4), (0, 149)]])
@pytest.mark.parametrize("causal", [False, True])
def test_padding_takes_no_part(random_qkv, padding_mask, projection, causal, sides):
    query, key, value = random_qkv(queries=150)
    mask = padding_mask(150, sides)
    key[1, :, ~mask[1]] += 40  # would move the stabiliser of the keys
    output = linear_attention(query, key, value, projection, causal=causal, scaling=0.4, attention_mask=mask)
    expected = naive(query, key, value, projection, causal=causal, scaling=0.4, attention_mask=mask)
    torch.testing.assert_close(output, expected, rtol=1e-11, atol=1e-11)
    assert (output.transpose(1, 2)[~mask] == 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_an_item_of_padding_alone_gives_zeros_and_finite_gradients(random_qkv, padding_mask, projection, causal):
    inputs = [x.requires_grad_() for x in random_qkv(queries=6)]
    mask = padding_mask(6, [(6, 0), (0, 0)])
    output = linear_attention(*inputs, projection, causal=causal, attention_mask=mask)
    output.sum().backward()
    assert (output[0] == 0).all()
    assert output[1].abs().min() > 0
    for tensor in inputs:
        assert tensor.grad.isfinite().all()
        assert (tensor.grad[0] == 0).all()


def test_published_numbers(golden):
    mask = golden["attention_mask"]
    output = linear_attention(
        golden["q"],
        golden["k"],
        golden["v_for_atten"],
        golden["projection"],
        causal=golden["causal"],
        scaling=golden["scaling"],
        attention_mask=mask,
    )
    complete = mask.all(-1)  # the published form lets padded keys into the normaliser
    assert complete.any()
    torch.testing.assert_close(output[complete], golden["performer_context_layer"][complete], rtol=0, atol=1e-5)


def test_causal_form_agrees_with_performer_pytorch(random_qkv, projection):
    query, key, value = random_qkv(queries=150, groups=4)
    q, k = (generalized_kernel(x, projection_matrix=projection) for x in (query, key))
    expected = causal_linear_attention_noncuda(q, k, value)
    output = linear_attention(query, key, value, projection, causal=True)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)


def test_bidirectional_form_agrees_with_performer_pytorch(random_qkv, projection):
    query, key, value = random_qkv(queries=9, groups=4)
    q = softmax_kernel(query, projection_matrix=projection, is_query=True)
    k = softmax_kernel(key, projection_matrix=projection, is_query=False)
    output = linear_attention(query, key, value, projection, causal=False)
    torch.testing.assert_close(output, performer_attention(q, k, value), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cut", [1, 128, 157])
@pytest.mark.parametrize("sides", [[(0, 0), (0, 0)], [(140, 0), (0, 160)]])
def test_two_calls_continue_one_sequence(random_qkv, padding_mask, projection, cut, sides):
    query, key, value = random_qkv(queries=200)
    mask = padding_mask(200, sides)
    whole, whole_state = linear_attention(
        query, key, value, projection, causal=True, attention_mask=mask, return_state=True
    )
    state, outputs = None, []
    for part in (slice(0, cut), slice(cut, 200)):
        output, state = linear_attention(
            *(x[:, :, part] for x in (query, key, value)),
            projection,
            causal=True,
            attention_mask=mask[:, part],
            initial_state=state,
            return_state=True,
        )
        outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, 2), whole, rtol=1e-11, atol=1e-11)
    for got, expected in zip(state, whole_state, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_state_holds_sums_over_real_keys(projection):
    projection = torch.tensor([[1.0, 0.0], [0.0, -2.0]])
    key = torch.tensor([[3.0, 1.0], [2.0, -1.0], [9.0, 9.0]])[None, None]
    value = torch.tensor([[1.0], [10.0], [100.0]])[None, None]
    mask = torch.tensor([[1, 1, 0]])
    _, state = linear_attention(key, key, value, projection, causal=True, attention_mask=mask, return_state=True)
    scale = 2**-0.25
    first, second = [3 * scale + 1e-3, 1e-3], [2 * scale + 1e-3, 2 * scale + 1e-3]
    torch.testing.assert_close(state.key_sum, torch.tensor([[[a + b for a, b in zip(first, second, strict=True)]]]))
    expected = [[a + 10 * b] for a, b in zip(first, second, strict=True)]
    torch.testing.assert_close(state.key_value, torch.tensor([[expected]]))


def test_queries_are_the_last_positions(random_qkv, projection):
    query, key, value = random_qkv(queries=290)
    whole, whole_state = linear_attention(query, key, value, projection, causal=True, return_state=True)
    last, state = linear_attention(query[:, :, 280:], key, value, projection, causal=True, return_state=True)
    torch.testing.assert_close(last, whole[:, :, 280:], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state.key_value, whole_state.key_value, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("changed", [1, 127, 128, 199])
def test_no_row_sees_a_later_key(random_qkv, projection, changed):
    query, key, value = (x.float() for x in random_qkv(queries=200))
    before = linear_attention(query, key, value, projection, causal=True)
    key[:, :, changed] += 1
    value[:, :, changed] -= 1
    after = linear_attention(query, key, value, projection, causal=True)
    assert torch.equal(after[:, :, :changed], before[:, :, :changed])
    assert not torch.equal(after[:, :, changed], before[:, :, changed])


@pytest.mark.parametrize("causal", [False, True])
def test_gradients(random_qkv, padding_mask, projection, causal, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK", 2)  # so that the state takes part
    inputs = [x.requires_grad_() for x in random_qkv(heads=2, groups=1, queries=5)]
    mask = padding_mask(5, [(1, 0), (0, 2)])

    def attend(query, key, value):
        return linear_attention(query, key, value, projection.double(), causal=causal, attention_mask=mask)

    assert torch.autograd.gradcheck(attend, inputs)


def test_gradient_to_the_initial_state(random_qkv, projection):
    query, key, value = random_qkv(batch=1, heads=2, groups=1, queries=3)

    def attend(key_value, key_sum):
        state = LinearState(key_value, key_sum)
        return linear_attention(query, key, value, projection.double(), causal=True, initial_state=state)

    sums = torch.rand(1, 1, FEATURES, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(attend, (torch.rand(1, 1, FEATURES, 3).double().requires_grad_(), sums))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(random_qkv, projection, causal, dtype):
    query, key, value = (x.to(dtype) for x in random_qkv(queries=140))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = linear_attention(query, key, value, projection, causal=causal)
    assert output.dtype == dtype
    exact = linear_attention(query.double(), key.double(), value.double(), projection, causal=causal)
    torch.testing.assert_close(output, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_only_chunk_starts_are_stored_for_the_backward_pass(random_qkv, projection):
    query, key, value = (x.requires_grad_() for x in random_qkv(batch=1, heads=2, groups=1, queries=1024))
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: stored.append(x.numel()) or x, lambda x: x):
        linear_attention(query, key, value, projection, causal=True)
    assert max(stored) <= query.numel()  # nothing of T x M, nor of T x 128


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projection": torch.ones(6, 4)}, r"projection has shape \(6, 4\), expected .* \('any', 5\)"),
        ({"key": torch.ones(2, 3, 7, 5).double()}, "query has 4 heads, expected a multiple of key's 3"),
        ({"value": torch.ones(2, 2, 8, 3).double()}, "value has shape"),
        ({"value": torch.ones(2, 2, 7, 3)}, "value has dtype torch.float32"),
        ({"attention_mask": torch.ones(2, 8)}, "attention_mask has shape"),
        ({"causal": False, "return_state": True}, "return_state was given with causal=False"),
        ({"initial_state": LinearState(torch.ones(2, 2, 6, 4), torch.ones(2, 2, 6))}, "initial_state.key_value has"),
        ({"backend": "cuda"}, "backend is 'cuda'"),
    ],
)
def test_errors_name_the_argument(random_qkv, projection, change, message):
    arguments = dict(zip(("query", "key", "value"), random_qkv(), strict=True))
    with pytest.raises(ValueError, match=message):
        linear_attention(**arguments | {"projection": projection, "causal": True} | change)
