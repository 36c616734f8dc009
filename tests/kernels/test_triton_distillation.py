"""The Triton forms of distillation against the PyTorch forms in float64, in the interpreter where there is no GPU.

The PyTorch forms run on the CPU: on a GPU some of their operations have no deterministic form.
"""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode

from sea_kernels import attention_loss, estimation_loss, kept_mass, state_loss, teacher_statistics
from sea_kernels.bins import bin_of, bin_start
from sea_kernels.distillation import TeacherStatistics, reference, triton_attention, triton_teacher
from sea_kernels.distillation.triton_teacher import relative_bins
from sea_kernels.masks import BinMask, RunMask, pack_bits

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = [torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])  # the interpreter's bfloat16 is wrong
LAYOUTS = [("relative", 0), ("relative", -190), ("aligned", 0)]
PLACES = {  # causal, queries, keys, (padding left, padding right) per item
    "causal": (True, 63, 63, None),
    "one row": (True, 1, 111, None),
    "fewer keys than bins": (True, 20, 20, None),
    "cache and padding": (True, 70, 111, [(46, 0), (0, 21)]),
    "bidirectional": (False, 111, 111, None),
    "bidirectional, padding": (False, 66, 66, [(10, 3), (66, 0)]),  # the second item is empty
}


@pytest.fixture(params=PLACES)
def place(request, padding_mask):
    """Number of items, queries and keys, and the arguments that say which keys a row sees."""
    causal, queries, keys, sides = PLACES[request.param]
    mask = None if sides is None else padding_mask(keys, sides)
    return 1 if sides is None else len(sides), queries, keys, {"causal": causal, "attention_mask": mask}


def random(*shape, seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (size * torch.randn(*shape, dtype=torch.float64, generator=generator)).float().to(DEVICE)


def random_mask(shape, layout, shift=0):
    keep = torch.rand(*shape, 32, generator=torch.Generator().manual_seed(1)) < 0.3
    return BinMask(pack_bits(keep), 32, layout, shift)


def exact(x):
    return x.detach().cpu().double()


def on_device(value):
    """The same tensor, mask or set of arguments on ``DEVICE``."""
    if isinstance(value, dict):
        return {name: on_device(entry) for name, entry in value.items()}
    if isinstance(value, BinMask):
        return replace(value, bits=value.bits.to(DEVICE))
    if isinstance(value, RunMask):
        return replace(value, starts=value.starts.to(DEVICE))
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value


def assert_near(actual, expected, tolerance=1e-5):
    """The error is within ``tolerance`` of the size of the expected result."""
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        assert (one.cpu().double() - other).norm() <= tolerance * other.norm()


def with_gradients(losses, inputs, size=1.0):
    """Losses and the gradients of a randomly weighted sum of them."""
    weights = [random(*loss.shape, seed=seed, size=size).to(loss) for seed, loss in enumerate(losses)]
    total = sum((weight * loss).sum() for weight, loss in zip(weights, losses, strict=True))
    return [loss.detach() for loss in losses], torch.autograd.grad(total, inputs)


def compare_statistics(query, key, num_bins=32, tolerance=1e-5, **rest):
    rest |= {"num_bins": num_bins, "scaling": 0.4}
    actual = teacher_statistics(query, key, backend="triton", **on_device(rest))
    expected = teacher_statistics(exact(query), exact(key), backend="reference", **rest)
    assert all(tensor.dtype == torch.float32 for tensor in actual)
    assert_near(actual, expected, tolerance)


def compare_estimation_losses(scores, statistics, gradient_tolerance=1e-5, **rest):
    """``statistics`` are in float64 and on the CPU."""
    numbers = TeacherStatistics(*(tensor.float().to(DEVICE) for tensor in statistics))
    scores, twin = scores.requires_grad_(), exact(scores).requires_grad_()
    losses = estimation_loss(scores, numbers, backend="triton", **on_device(rest))
    losses, (grad,) = with_gradients(losses, [scores])
    expected, (expected_grad,) = with_gradients(estimation_loss(twin, statistics, backend="reference", **rest), [twin])
    assert all(loss.dtype == torch.float32 for loss in losses)
    assert grad.dtype == scores.dtype
    assert_near(losses, expected)
    assert_near([grad], [expected_grad], gradient_tolerance)


def compare_attention_losses(
    tensors, *, size=1.0, tolerance=1e-5, gradient_tolerance=1e-5, wanted=(True, True), **rest
):
    """Losses and gradients of teacher's and student's ``[N, H, T, D]``, ``[N, G, S, D]``; returns the gradients."""
    results = []
    for backend, cast, place in (("triton", torch.clone, on_device(rest)), ("reference", exact, rest)):
        teacher_query, teacher_key, *student = map(cast, tensors)
        inputs = [x.requires_grad_() for x, is_wanted in zip(student, wanted, strict=True) if is_wanted]
        scalings = {"teacher_scaling": 0.6, "scaling": 0.3}
        losses = attention_loss(teacher_query, teacher_key, *student, backend=backend, **scalings, **place)
        results.append(with_gradients(losses, inputs, size))
    (losses, grads), (expected, expected_grads) = results
    assert all(loss.dtype == torch.float32 for loss in losses)
    assert all(grad.dtype == tensors[2].dtype for grad in grads)
    assert_near(losses, expected, tolerance)
    assert_near(grads, expected_grads, gradient_tolerance)
    return grads


def compare_kept_mass(query, key, mask, tolerance=1e-5, **rest):
    rest["scaling"] = 0.4
    actual = kept_mass(query, key, on_device(mask), backend="triton", **on_device(rest))
    expected = kept_mass(exact(query), exact(key), mask, backend="reference", **rest)
    assert actual.dtype == torch.float32
    assert_near([actual], [expected], tolerance)


@pytest.mark.parametrize(("layout", "shift"), LAYOUTS)
def test_statistics_match(place, layout, shift):
    batch, queries, keys, rest = place
    query, key = random(batch, 2, queries, 16), random(batch, 1, keys, 16, seed=1)
    compare_statistics(query, key, layout=layout, shift=shift, **rest)


def attention_log_sum(query, key, causal, scaling):
    """What flash attention leaves of ``[N, H, T, D]`` and ``[N, G, T, D]`` of the same dtype; strides are its own."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    if query.is_cuda:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, key, 0.0, causal, scale=scaling)[1]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, key, 0.0, causal, scale=scaling)[1]


@pytest.fixture
def counted_log_sums(monkeypatch):
    """A list that has an entry for every call of the kernel that computes log-sum-exps."""
    count = []
    for module in (triton_teacher, triton_attention):
        compute = module.row_lse
        monkeypatch.setattr(module, "row_lse", lambda *a, compute=compute, **b: count.append(1) or compute(*a, **b))
    return count


@pytest.mark.parametrize("dtype", HALF if DEVICE == "cuda" else [torch.float32, *HALF])
@pytest.mark.parametrize("causal", [True, False])
def test_log_sums_of_flash_attention_save_a_walk(counted_log_sums, causal, dtype):
    query, key = random(2, 4, 70, 16).to(dtype), random(2, 2, 70, 16, seed=1).to(dtype)
    log_sum = attention_log_sum(query, key, causal, 0.4)
    tolerance = 2e-4 if dtype in HALF and DEVICE == "cpu" else 1e-5  # the CPU approximates exp in half precision
    rest = {"num_bins": 32, "layout": "aligned", "causal": causal, "scaling": 0.4}
    actual = teacher_statistics(query, key, backend="triton", log_sum=log_sum, **rest)
    assert not counted_log_sums
    assert_near(actual, teacher_statistics(exact(query), exact(key), backend="reference", **rest), tolerance)
    assert_near(actual, map(exact, teacher_statistics(query, key, backend="triton", **rest)), tolerance)

    student, rest = random(2, 4, 70, 16, seed=2).to(dtype), {"causal": causal, "teacher_scaling": 0.4, "scaling": 0.3}
    counted_log_sums.clear()
    losses = attention_loss(query, key, student, key, backend="triton", teacher_log_sum=log_sum, **rest)
    assert not counted_log_sums  # the student's come with its losses
    expected = attention_loss(*map(exact, (query, key, student, key)), backend="reference", **rest)
    assert_near(losses, expected, tolerance)


@triton.jit
def find_bins(PLACE, LENGTH, OUT, shift, count, NUM_BINS: tl.constexpr, HAS_SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place, length = tl.load(PLACE + offset), tl.load(LENGTH + offset)
    index, start, end = relative_bins(place, length, shift, NUM_BINS, HAS_SHIFT)
    tl.store(OUT + offset, index)
    tl.store(OUT + count + offset, start)
    tl.store(OUT + 2 * count + offset, end)


@pytest.mark.parametrize("shift", [0, 150, -190, 700])
@pytest.mark.parametrize("num_bins", [32, 96, 1024])
def test_relative_bins_are_exact_up_to_the_longest_rows(num_bins, shift):
    generator = torch.Generator().manual_seed(0)
    length = (2 ** (21 * torch.rand(4096, generator=generator, dtype=torch.float64))).long().clamp(1, 2**21 - 1)
    length[:512] = 2**21 - 1
    place = (torch.rand(4096, generator=generator, dtype=torch.float64) * length).long()
    near = torch.randint(-1, 2, (4096,), generator=generator)  # around an edge
    edge = bin_start(bin_of(place, length, num_bins, "relative", shift), length, num_bins, "relative", shift)
    place[::2] = torch.minimum((edge + near).clamp_min(0), length - 1)[::2]
    out = torch.zeros(3, 4096, dtype=torch.int32, device=DEVICE)
    args = place.int().to(DEVICE), length.int().to(DEVICE), out, shift, 4096
    find_bins[(4,)](*args, NUM_BINS=num_bins, HAS_SHIFT=shift != 0, BLOCK=1024)
    index = bin_of(place, length, num_bins, "relative", shift)
    starts = [bin_start(bin_, length, num_bins, "relative", shift) for bin_ in (index, index + 1)]
    assert torch.equal(out.cpu().long(), torch.stack([index, *starts]))


@pytest.mark.parametrize("layout", ["relative", "aligned"])
@pytest.mark.parametrize(("queries", "keys"), [(3, 700), (2, 2049)])
def test_bins_across_tiles_of_keys(layout, queries, keys):
    """Rows of several widths next to each other, bins that begin and end anywhere in a tile, bins wider than one."""
    query, key = random(1, 1, queries, 16, size=2.0), random(1, 1, keys, 16, seed=1)
    compare_statistics(query, key, layout=layout, causal=True)


@pytest.mark.parametrize("dtype", HALF)
def test_statistics_of_half_precision_odd_widths_and_transposed_inputs(dtype):
    query, key = random(1, 70, 4, 59).to(dtype).transpose(1, 2), random(1, 70, 2, 59, seed=1).to(dtype).transpose(1, 2)
    compare_statistics(query, key, num_bins=96, layout="relative", causal=True, tolerance=1e-4)


@pytest.mark.parametrize(("layout", "shift"), LAYOUTS)
def test_estimation_loss_matches(place, layout, shift):
    batch, queries, keys, rest = place
    rest |= {"layout": layout, "shift": shift}
    query, key = exact(random(batch, 2, queries, 16)), exact(random(batch, 2, keys, 16, seed=1))
    statistics = teacher_statistics(query, key, num_bins=32, scaling=0.4, **rest)
    scores = random(batch, 2, queries, 32, seed=2, size=2.0)
    compare_estimation_losses(scores, statistics, num_keys=keys, **rest)


@pytest.mark.parametrize("dtype", HALF)
def test_estimation_loss_of_half_precision_and_transposed_scores(dtype):
    query, key = exact(random(1, 2, 45, 8)), exact(random(1, 2, 45, 8, seed=1))
    rest = {"layout": "relative", "causal": True}
    statistics = teacher_statistics(query, key, num_bins=96, scaling=1.0, **rest)
    scores = random(1, 45, 2, 96, seed=2).to(dtype).transpose(1, 2)
    compare_estimation_losses(scores, statistics, gradient_tolerance=1e-2, **rest)


def test_attention_loss_matches(place):
    """With key heads for two query heads each in the student, and another number and width of heads in the teacher."""
    batch, queries, keys, rest = place
    student = random(batch, 4, queries, 16), random(batch, 2, keys, 16, seed=1)
    teacher = random(batch, 4, queries, 8, seed=2), random(batch, 1, keys, 8, seed=3)
    grads = compare_attention_losses((*teacher, *student), **rest)
    if rest["attention_mask"] is not None:
        for grad in grads:
            assert not grad.cpu().transpose(1, 2)[~rest["attention_mask"][:, -grad.shape[2] :]].any()


def test_what_padding_holds_does_not_matter(padding_mask):
    mask = on_device(padding_mask(70, [(50, 0), (3, 9)]))
    rest = {"causal": True, "attention_mask": mask, "backend": "triton"}
    results = []
    for filling in (0.0, torch.nan):
        query, key = (
            torch.where(mask[:, None, :, None], random(2, heads, 70, 16, seed=heads), filling) for heads in (4, 2)
        )
        statistics = teacher_statistics(query, key, num_bins=32, layout="relative", scaling=1.0, **rest)
        student = [x.clone().requires_grad_() for x in (query, key)]
        losses = attention_loss(query, key, *student, teacher_scaling=1.0, scaling=0.5, **rest)
        losses, grads = with_gradients(losses, student)
        results.append((*statistics, *losses, *grads))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", HALF)
def test_attention_loss_of_half_precision_and_odd_widths(dtype):
    student = random(1, 70, 2, 59).to(dtype), random(1, 70, 1, 59, seed=1).to(dtype)
    teacher = random(1, 70, 2, 27, seed=2).to(dtype), random(1, 70, 2, 27, seed=3).to(dtype)
    tensors = [x.transpose(1, 2) for x in (*teacher, *student)]
    rounding = 1e-3 if dtype == torch.float16 else 1e-2
    compare_attention_losses(tensors, tolerance=1e-4, gradient_tolerance=rounding, causal=True)


def test_small_gradients_in_half_precision():
    """The mean over many rows makes gradients of scores that float16 cannot hold; the query's it can."""
    query, key = random(2, 2, 40, 16, size=0.02).half(), random(2, 2, 40, 16, seed=1, size=100.0).half()
    tensors = query[:1], key[:1], query[1:], key[1:]
    rest = {"tolerance": 1e-4, "gradient_tolerance": 0.05, "wanted": (True, False), "causal": True}
    compare_attention_losses(tensors, size=1e-6, **rest)


@pytest.mark.parametrize("width", [128, 256])
def test_attention_loss_of_wide_heads(width):
    tensors = [random(1, 1, 45, width, seed=seed) for seed in range(4)]
    compare_attention_losses(tensors, causal=True)


def test_only_wanted_gradients_are_computed():
    tensors = [random(1, 2, 20, 8, seed=seed) for seed in range(4)]
    both = compare_attention_losses(tensors, causal=True)
    for index, wanted in enumerate([(True, False), (False, True)]):
        (grad,) = compare_attention_losses(tensors, wanted=wanted, causal=True)
        assert torch.equal(grad, both[index])


def test_the_teacher_gets_no_gradient():
    query, key = random(1, 2, 20, 16).requires_grad_(), random(1, 2, 20, 16, seed=1).requires_grad_()
    rest = {"causal": True, "backend": "triton"}
    statistics = teacher_statistics(query, key, num_bins=32, layout="aligned", scaling=1.0, **rest)
    constants = TeacherStatistics(*(tensor.requires_grad_() for tensor in statistics))
    losses = attention_loss(query, key, query.detach(), key.detach(), teacher_scaling=1.0, scaling=1.0, **rest)
    losses += estimation_loss(random(1, 2, 20, 32), constants, layout="aligned", **rest)
    assert not any(loss.requires_grad for loss in losses)


def test_the_teacher_s_own_scores_cost_nothing():
    query, key = random(1, 2, 70, 16), random(1, 1, 70, 16, seed=1)
    rest = {"causal": True, "teacher_scaling": 0.7, "scaling": 0.7, "backend": "triton"}
    losses = attention_loss(query, key, query.requires_grad_(), key, **rest)
    assert not any(loss.any() for loss in losses)
    assert not torch.autograd.grad(sum(loss.sum() for loss in losses), query)[0].any()


@pytest.mark.parametrize(("layout", "shift"), LAYOUTS)
@pytest.mark.parametrize(
    ("causal", "queries", "keys", "sides"),
    [(True, 20, 63, [(50, 0), (0, 11)]), (True, 1, 40, [(0, 0)]), (False, 21, 21, [(6, 3), (21, 0)])],
)
def test_kept_mass_of_bins_matches(padding_mask, causal, queries, keys, sides, layout, shift):
    query, key = random(len(sides), 2, queries, 16), random(len(sides), 1, keys, 16, seed=1)
    mask = random_mask(query.shape[:3], layout, shift)
    compare_kept_mass(query, key, mask, causal=causal, attention_mask=padding_mask(keys, sides))


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_kept_mass_of_runs_matches(dtype):
    query, key = random(1, 2, 40, 27).to(dtype), random(1, 2, 63, 27, seed=1).to(dtype)
    starts = torch.tensor([0, 8, 16, -1], dtype=torch.int32).expand(1, 2, 40, 4).contiguous()
    compare_kept_mass(query, key, RunMask(starts, width=4), tolerance=1e-4, causal=True)


def all_operations(query, key, scores, backend):
    """Every operation once, with gradients."""
    rest = {"causal": True, "backend": backend}
    statistics = teacher_statistics(query, key, num_bins=32, layout="aligned", scaling=1.0, **rest)
    inputs = [x.clone().requires_grad_() for x in (query, key, scores)]
    losses = estimation_loss(inputs[2], statistics, layout="aligned", **rest)
    losses += attention_loss(query, key, *inputs[:2], teacher_scaling=1.0, scaling=0.5, **rest)
    kept = kept_mass(query, key, on_device(random_mask(query.shape[:3], "aligned")), scaling=1.0, **rest)
    losses, grads = with_gradients(losses, inputs)
    return *statistics, *losses, kept, *grads


def test_the_kernels_run(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the PyTorch form was called")

    for name in ("teacher_statistics", "estimation_loss", "attention_loss", "kept_mass"):
        monkeypatch.setattr(reference, name, refuse)
    tensors = random(1, 2, 20, 16), random(1, 1, 20, 16, seed=1), random(1, 2, 20, 32, seed=2)
    first, second = (all_operations(*tensors, "triton") for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))  # deterministic, too
    if DEVICE == "cuda":
        all_operations(*tensors, "auto")
    else:
        with pytest.raises(AssertionError, match="PyTorch form"):
            all_operations(*tensors, "auto")


class LargestTensor(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that an operation made."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_memory_is_linear():
    rows = 130
    tensors = random(1, 1, rows, 16), random(1, 1, rows, 16, seed=1), random(1, 1, rows, 32, seed=2)
    with LargestTensor() as largest:
        all_operations(*tensors, "triton")
    assert rows * 32 <= largest.numel < rows * rows


@pytest.mark.parametrize(("num_keys", "num_bins"), [(2**21, 32), (2**11, 2**20)])
def test_bins_whose_edges_need_64_bits_have_no_kernel(num_keys, num_bins):
    query, key = torch.empty(1, 1, 1, 8), torch.empty(1, 1, 1, 8).expand(1, 1, num_keys, 8)
    rest = {"layout": "relative", "causal": True, "scaling": 1.0, "backend": "triton"}
    with pytest.raises(NotImplementedError, match="no Triton form for these inputs"):
        teacher_statistics(query, key, num_bins=num_bins, **rest)


def test_float64_has_no_kernel():
    query, key, scores = (exact(x) for x in (random(1, 2, 20, 8), random(1, 2, 20, 8), random(1, 2, 20, 32)))
    rest = {"causal": True, "backend": "triton"}
    statistics = teacher_statistics(query, key, num_bins=32, layout="aligned", scaling=1.0, causal=True)
    with pytest.raises(NotImplementedError, match=r"teacher_statistics.* no Triton form"):
        teacher_statistics(query, key, num_bins=32, layout="aligned", scaling=1.0, **rest)
    with pytest.raises(NotImplementedError, match=r"estimation_loss.* no Triton form"):
        estimation_loss(scores, statistics, layout="aligned", **rest)
    with pytest.raises(NotImplementedError, match=r"attention_loss.* no Triton form"):
        attention_loss(query, key, query.float(), key.float(), teacher_scaling=1.0, scaling=1.0, **rest)
    with pytest.raises(NotImplementedError, match=r"kept_mass.* no Triton form"):
        kept_mass(query, key, random_mask((1, 2, 20), "aligned"), scaling=1.0, **rest)


def state_losses(pairs, backend, cast, **options):
    """The loss of pairs of states, and its gradients to the student's."""
    teacher, student = ([cast(state) for state in states] for states in zip(*pairs, strict=True))
    student = [state.requires_grad_() for state in student]
    loss = state_loss(teacher, student, backend=backend, **options)
    return loss, *torch.autograd.grad(-3 * loss, student)


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize(("shape", "padded"), [((2, 70, 300), False), ((3, 41, 2, 12), True)])
def test_state_loss_matches(shape, padded, relative):
    pairs = [(random(*shape, seed=seed), random(*shape, seed=seed + 9)) for seed in range(2 if padded else 1)]
    options = {"relative": relative}
    if padded:
        options["attention_mask"] = torch.arange(41) < torch.tensor([[41], [20], [0]])  # the last item is empty
    expected = state_losses(pairs, "reference", exact, **options)
    if padded:
        for state in (state for pair in pairs for state in pair):
            state[~options["attention_mask"].to(DEVICE)] = torch.nan
    loss, *grads = state_losses(pairs, "triton", torch.clone, **on_device(options))
    torch.testing.assert_close(exact(loss), expected[0])
    for grad, wanted in zip(grads, expected[1:], strict=True):
        assert (exact(grad) - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("dtype", HALF)
def test_state_loss_of_contexts_in_half_precision(dtype):
    teacher, student = (random(1, 3, 50, 16, seed=seed).to(dtype).transpose(1, 2) for seed in range(2))
    loss, grad = state_losses([(teacher, student)], "triton", torch.detach, relative=True)
    expected, wanted = state_losses([(teacher, student)], "reference", exact, relative=True)
    torch.testing.assert_close(exact(loss), expected, rtol=1e-5, atol=0)
    assert (exact(grad) - wanted).norm() <= 1e-2 * wanted.norm()
    assert (grad.dtype, grad.stride()) == (dtype, student.stride())


def test_states_that_do_not_fit_are_refused():
    state = torch.zeros(1, 3, 4)
    with pytest.raises(ValueError, match="expected as many, at least 1"):
        state_loss([], [], relative=True)
    with pytest.raises(ValueError, match="a state of teacher has shape"):
        state_loss([state[:, 1:]], [state], relative=True)
    with pytest.raises(ValueError, match="attention_mask has shape"):
        state_loss([state], [state], relative=True, attention_mask=torch.ones(1, 2))
