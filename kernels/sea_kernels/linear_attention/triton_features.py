"""Random features inside kernels: a tile of them for a block of rows, from loaded rows and a tile of the projection."""

import triton
import triton.language as tl


@triton.jit
def load_rows(p_row, m_row, HEAD_DIM: tl.constexpr, HEAD_PADDED: tl.constexpr):
    """Rows at ``p_row [BLOCK]`` in float32, zeros where the mask is not set: ``[BLOCK, HEAD_PADDED]``."""
    o_dim = tl.arange(0, HEAD_PADDED)
    mask = m_row[:, None] & (o_dim < HEAD_DIM)[None, :]
    return tl.load(p_row[:, None] + o_dim[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def rounded(x, PRECISION: tl.constexpr):
    """float32 to the nearest TF32 number, where that is what products are taken in.

    The matrix units cut off what they do not read, which would make sums of products smaller than their normaliser, a
    sum of the whole factors.
    """
    if PRECISION == "tf32":
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return x


@triton.jit
def load_directions(
    P, o_feature, NUM_FEATURES: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_PADDED: tl.constexpr, PRECISION: tl.constexpr
):
    """Rows ``o_feature [TILE]`` of the projection, zeros beyond the last: ``[TILE, HEAD_PADDED]``."""
    b_p = load_rows(P + o_feature * HEAD_DIM, o_feature < NUM_FEATURES, HEAD_DIM, HEAD_PADDED)
    return rounded(b_p, PRECISION)


@triton.jit
def project(
    b_row,
    P,
    o_feature,
    scale,
    NUM_FEATURES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``scale * rows P^T`` for the features ``o_feature [TILE]``: ``[BLOCK, TILE]``, zero beyond the last feature."""
    b_p = load_directions(P, o_feature, NUM_FEATURES, HEAD_DIM, HEAD_PADDED, PRECISION)
    return tl.dot(b_row, tl.trans(b_p), input_precision=PRECISION) * scale


@triton.jit
def relu_features(projected, mask, PRECISION: tl.constexpr):
    """The causal features, rounded; zero where ``mask`` is not set."""
    EPSILON: tl.constexpr = 1e-3
    return rounded(tl.where(mask, tl.maximum(projected, 0.0) + EPSILON, 0.0), PRECISION)


@triton.jit
def exp_features(projected, half_norm, stabiliser, mask, PRECISION: tl.constexpr):
    """The bidirectional features, rounded, without their common factor M^-1/2, which a weighted mean does not see."""
    EPSILON: tl.constexpr = 1e-4
    return rounded(tl.where(mask, tl.exp(projected - half_norm - stabiliser) + EPSILON, 0.0), PRECISION)


@triton.jit
def half_norms(b_row, HEAD_DIM: tl.constexpr):
    """``|x|^2 / (2 sqrt(D))`` of each row."""
    return tl.sum(b_row * b_row, 1) / (2.0 * (HEAD_DIM**0.5))
