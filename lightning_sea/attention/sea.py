"""SEA attention of one layer: estimate a compressed attention row, keep its best bins, attend exactly to their keys.

The method in one file, in the order in which it runs; the parts lie beside it.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

import sea_kernels as ops
from sea_kernels.masks import BinMask, RunMask, share_bins, take_rows
from sea_kernels.spans import RowSpans, row_spans

from ..config import SEAConfig
from .average import estimated_mean
from .budgets import HeadBudgets
from .decoder import BidirectionalDecoder, CausalDecoder
from .encoder import Encoder
from .estimate import Estimate, log_probabilities
from .features import RandomFeatures
from .gates import EncodedGates, QueryGates
from .positions import SinusoidPositions, stretched_identity
from .rows import leading_rows, rows_at_once, spans_of_rows


class SEAAttention(nn.Module):
    """Stands in for softmax attention between the host's projections (SEA, arXiv 2310.01777, section 3).

    Holds only the parameters that its configuration uses. Dropout on attention probabilities, which a host may ask
    for in training, is not applied: the mask is the regulariser.

    Args:
        config: every knob.
        num_heads: query heads H.
        num_kv_heads: key and value heads G, a divisor of H.
        head_dim: D.
        causal: whether a row sees only keys up to its own position.

    Raises:
        ValueError: if the configuration does not fit the kind of attention.
    """

    def __init__(self, config: SEAConfig, *, num_heads: int, num_kv_heads: int, head_dim: int, causal: bool) -> None:
        super().__init__()
        if causal and config.grouping in ("head", "batch"):
            raise ValueError(
                f"grouping is {config.grouping!r}, which lets later rows decide over earlier ones: causal attention "
                "needs 'query' or 'causal_batch'"
            )
        if not causal and (config.window or config.query_stride > 1):
            raise ValueError(
                f"window is {config.window} and query_stride {config.query_stride}, expected 0 and 1: "
                "bidirectional rows have no most recent keys"
            )
        self.config = config
        self.num_heads, self.num_kv_heads, self.head_dim, self.causal = num_heads, num_kv_heads, head_dim, causal
        num_gates = {"none": 1, "mean": 2, "far": 0}[config.average_context]
        if config.decoder == "conv":
            self._add_decoder(config)
        if num_gates and config.decoder == "conv":
            self.gates = EncodedGates(head_dim, num_gates, config.gate_bias)
        elif num_gates:
            self.gates = QueryGates(num_heads, head_dim, num_gates, config.gate_bias)
        else:
            self.centre = nn.Parameter(torch.zeros(num_heads, head_dim))
        if config.pooling != "none":
            share = 0.5 if config.pooling == "mean_bound" else 1.0
            self.mean_weight = nn.Parameter(torch.full((num_heads,), share))
        if config.pooling == "mean_bound":
            self.bound_weight = nn.Parameter(torch.full((num_heads,), 0.5))
        if self.selects_from_keys:
            self.budgets = HeadBudgets(num_heads)

    def _add_decoder(self, config: SEAConfig) -> None:
        pooled = config.pooling != "none"
        self.features = RandomFeatures(self.head_dim, config.feature_ratio)
        self.encoder = Encoder(self.head_dim)
        sizes = (self.num_heads, self.head_dim, config.predictor_length)
        if self.causal:
            self.positions = SinusoidPositions(self.head_dim, config.position_period)
            self.decoder = CausalDecoder(*sizes, subpixel=config.upsampling == "subpixel", pooled=pooled)
        else:
            self.decoder = BidirectionalDecoder(*sizes, pooled=pooled)
        if pooled:
            self.decoder_weight = nn.Parameter(torch.ones(self.num_heads))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        attention_mask: Tensor | None = None,
        with_scores: bool = True,
    ) -> tuple[Tensor, Estimate]:
        """Attend.

        Args:
            query: ``[N, H, T, D]`` as the host hands it to attention: positions already rotated in.
            key, value: ``[N, G, S, D]``; the queries are the last T of the S positions.
            scaling: the host's score factor.
            attention_mask: bool or integer ``[N, S]``, nonzero at real tokens (contiguous), or None.
            with_scores: whether the estimate shall hold its scores. Without, they need not exist in memory.

        Returns:
            The context ``[N, T, H, D]``, zero in padding rows, and what was estimated on the way.

        Raises:
            ValueError: if shapes do not fit, or if the estimator needs rows that only a cache holds.
        """
        bidirectional_mean = not self.causal and self.config.average_context == "mean"
        place = {"scaling": scaling, "attention_mask": attention_mask}
        estimate = self.estimate(query, key, value, with_scores=with_scores or bidirectional_mean, **place)
        place |= {"causal": self.causal, "backend": self.config.backend}
        if self.config.average_context == "far":
            context = ops.far_field_attention(
                query, key, value, estimate.mask, estimate.coarse, centre=self.centre, **place
            )
            return context.transpose(1, 2), estimate
        context = ops.sparse_attention(query, key, value, estimate.mask, row_scale=estimate.prob_scale, **place)
        if estimate.mix_scale is not None:
            context = self._mix_average(context, query, value, estimate, attention_mask)
        return context.transpose(1, 2), estimate

    def estimate(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float,
        attention_mask: Tensor | None = None,
        with_scores: bool = True,
    ) -> Estimate:
        """Estimate the attention of every row without attending; arguments as for ``forward``."""
        self._check_cache(query.shape[2], key.shape[2])
        shift = self._draw_shift()
        place = {"scaling": scaling, "causal": self.causal, "attention_mask": attention_mask}
        far = self.config.average_context == "far"
        if self.selects_from_keys:
            scores = self._pooled_scores(query, key, shift=shift, **place) if with_scores else None
            mask = self._select_from_keys(query, key, **place)
            gates = () if far else self.gates(query)
        else:
            scores, mask, gates = self._estimate_by_scores(query, key, value, shift, with_scores, **place)
        coarse = None
        if self.config.first_look_ratio > 1:
            coarse, mask = mask, self._look_twice(query, key, mask, **place)
        return Estimate(
            scores=scores,
            mask=mask,
            prob_scale=None if far else gates[0],
            mix_scale=gates[1] if len(gates) > 1 else None,
            layout=self.config.bins,
            shift=shift,
            num_keys=key.shape[2],
            causal=self.causal,
            attention_mask=attention_mask,
            coarse=coarse,
            centre=self.centre if far else None,
        )

    def _estimate_by_scores(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        shift: int,
        with_scores: bool,
        *,
        scaling: float,
        causal: bool,
        attention_mask: Tensor | None,
    ) -> tuple[Tensor | None, BinMask, Tensor | tuple[()]]:
        """Scores (if wanted), the bins that they select, and gates (none with a far field)."""
        spans = self._spans(query, key, attention_mask)
        place = {"scaling": scaling, "causal": causal, "attention_mask": attention_mask}
        linear_context = None
        if self.config.decoder == "conv":
            linear_context = self._linear_context(query, key, value, spans, **place)
        whole = with_scores or torch.is_grad_enabled() or not causal or linear_context is None
        chunks = rows_at_once(query, self.config.predictor_length, whole)
        estimated = [
            self._estimate_rows(rows, query, key, value, linear_context, spans, shift, with_scores, **place)
            for rows in chunks
        ]
        scores, masks, gates = zip(*estimated, strict=True)
        mask = replace(masks[0], bits=torch.cat([part.bits for part in masks], 2)) if len(chunks) > 1 else masks[0]
        if self.config.query_stride > 1:
            mask = share_bins(mask, spans, self.config.query_stride, keep_own=self.config.keep_own)
        gates = () if self.config.average_context == "far" else torch.cat(gates, -1)
        return scores[0] if with_scores else None, mask, gates

    def _estimate_rows(
        self,
        rows: slice,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        linear_context: Tensor | None,
        spans: RowSpans,
        shift: int,
        with_scores: bool,
        *,
        scaling: float,
        causal: bool,
        attention_mask: Tensor | None,
    ) -> tuple[Tensor, BinMask, Tensor | None]:
        """Scores, selected bins and gates of some rows: all of them, or a chunk of causal ones."""
        lead = min(rows.start, self.decoder.look_back) if rows.start else 0  # rows that convolutions look back on
        seen = slice(rows.start - lead, rows.stop)
        num_keys = key.shape[2] - query.shape[2] + rows.stop
        query, key, value = query[:, :, seen], key[:, :, :num_keys], value[:, :, :num_keys]
        attention_mask = None if attention_mask is None else attention_mask[:, :num_keys]
        place = {"scaling": scaling, "causal": causal, "attention_mask": attention_mask}
        encoded = gates = None
        if linear_context is not None:
            encoded = self._encode(linear_context[:, :, seen], value)
        pooled = self._pooled_scores(query, key, shift=shift, **place)
        skips = self.config.query_stride >= 4 and not with_scores and not torch.is_grad_enabled()
        stride = self.config.query_stride if skips else 1  # 2 would save nothing: see the decoder
        scores = self._scores(encoded, pooled, spans_of_rows(spans, seen), lead, stride)
        mask = self._select_from_scores(scores.detach(), spans_of_rows(spans, rows), num_keys, shift, attention_mask)
        if self.config.average_context != "far":
            gates = self.gates((query if encoded is None else encoded)[:, :, lead:])
        return scores, mask, gates

    def redraw_projection(self, generator: torch.Generator | None = None) -> None:
        """Draw new random features, if the configuration has any; the same ``generator`` state on every rank."""
        if self.config.decoder == "conv":
            self.features.redraw(generator)

    def _spans(self, query: Tensor, key: Tensor, attention_mask: Tensor | None) -> RowSpans:
        batch, _, num_queries, _ = query.shape
        return row_spans(
            batch,
            num_queries,
            key.shape[2],
            causal=self.causal,
            attention_mask=attention_mask,
            device=query.device,
        )

    def _check_cache(self, num_queries: int, num_keys: int) -> None:
        if num_queries == num_keys:
            return
        for knob, needs in (("decoder", self.config.decoder == "conv"), ("query_stride", self.config.query_stride > 1)):
            if needs:
                raise ValueError(
                    f"{num_queries} queries with {num_keys} keys: with {knob}={getattr(self.config, knob)!r} the "
                    "estimator needs earlier queries, which a key-value cache does not hold; pass use_cache=False"
                )

    def _draw_shift(self) -> int:
        """Edge jitter of this batch (section 2 of the method's description): 0 outside training."""
        config = self.config
        if not self.training or config.bins != "relative" or torch.rand(()) >= config.jitter_probability:
            return 0
        return round((2 * torch.rand(()).item() - 1) * config.jitter_keys * 256)

    def _pooled_scores(self, query: Tensor, key: Tensor, **place) -> Tensor | None:
        """Mean-pooled scores and min/max bounds with one learned weight per head each."""
        config = self.config
        if config.pooling == "none":
            return None
        settings = {"num_bins": config.predictor_length, "layout": config.bins, "backend": config.backend, **place}
        weights = {"mean_weight": self.mean_weight, "bound_weight": self._bound_weight()}
        return ops.weighted_scores(query, key, **weights, **settings)

    def _linear_context(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        spans: RowSpans,
        *,
        scaling: float,
        causal: bool,
        attention_mask: Tensor | None,
    ) -> Tensor:
        """C: linear attention over values joined with positions. ``[N, H, T, 2D]``."""
        num_keys = key.shape[2]
        if causal:
            place = self.positions(num_keys, spans.start)
        else:
            place = stretched_identity(num_keys, self.head_dim, spans, spans.length.amax(-1))
        place = place[:, None].expand(-1, value.shape[1], -1, -1).to(value.dtype)
        return ops.linear_attention(
            query,
            key,
            torch.cat([place, value], dim=-1),
            self.features.projection,
            causal=causal,
            scaling=scaling,
            attention_mask=attention_mask,
            backend=self.config.backend,
        )

    def _encode(self, linear_context: Tensor, value: Tensor) -> Tensor:
        """Z of rows whose values are the last of ``value``: ``[N, H, R, 2D]``."""
        own_value = value[:, :, value.shape[2] - linear_context.shape[2] :]
        return self.encoder(linear_context, own_value.repeat_interleave(self.num_heads // value.shape[1], dim=1))

    def _scores(self, encoded: Tensor | None, pooled: Tensor | None, spans: RowSpans, lead: int, stride: int) -> Tensor:
        """Y: the decoder's scores, the pooled scores, or their weighted sum, of the rows after the first ``lead``.

        With a ``stride``, only rows that others share are decoded; the others get the scores of such a row, which
        nobody looks at. ``[N, H, R, K]``.
        """
        if encoded is None:
            return pooled
        normalised = None
        if pooled is not None:
            normalised = nn.functional.layer_norm(pooled, pooled.shape[-1:])
        arguments = encoded, normalised, spans.length > 0, spans.start
        if stride > 1:
            leaders, place = leading_rows(spans_of_rows(spans, slice(lead, None)), stride)
            decoded = take_rows(self.decoder(*arguments, leaders + lead), place)
        else:
            decoded = self.decoder(*arguments)[:, :, lead:]
        if pooled is None:
            return decoded
        return self.decoder_weight[:, None, None] * decoded.float() + pooled[:, :, lead:]

    @property
    def selects_from_keys(self) -> bool:
        """Whether pooled keys alone decide, every row and head for itself: then no scores need to be stored."""
        config = self.config
        return config.decoder == "none" and config.grouping == "query" and config.bins == "aligned"

    def _select_from_keys(self, query: Tensor, key: Tensor, **place) -> BinMask:
        config = self.config
        k, head_k = self.budgets.keys(config.k * config.first_look_ratio)
        return ops.pooled_selection(
            query,
            key,
            k=k,
            head_k=head_k,
            num_bins=config.predictor_length,
            mean_weight=self.mean_weight,
            bound_weight=self._bound_weight(),
            keep_first=config.keep_first,
            keep_own=config.keep_own,
            stride=config.query_stride,
            backend=config.backend,
            **place,
        )

    def _select_from_scores(
        self, scores: Tensor, spans: RowSpans, num_keys: int, shift: int, attention_mask: Tensor | None
    ) -> BinMask:
        config = self.config
        if config.grouping != "query":  # rows alone rank the same without
            scores = log_probabilities(scores, spans.length, config.bins)
        return ops.select_bins(
            scores,
            k=config.k * config.first_look_ratio,
            causal=self.causal,
            layout=config.bins,
            grouping=config.grouping,
            keep_first=config.keep_first,
            keep_own=config.keep_own,
            num_keys=num_keys,
            attention_mask=attention_mask,
            shift=shift,
            backend=config.backend,
        )

    def _look_twice(self, query: Tensor, key: Tensor, mask: BinMask, **place) -> RunMask:
        config = self.config
        return ops.second_look(
            query,
            key,
            mask,
            k=config.k,
            width=config.second_look_width,
            window=config.window,
            mean_weight=self.mean_weight,
            bound_weight=self._bound_weight(),
            keep_first=config.keep_first,
            stride=config.query_stride,
            backend=config.backend,
            **place,
        )

    def _bound_weight(self) -> Tensor | None:
        return self.bound_weight if self.config.pooling == "mean_bound" else None

    def _mix_average(
        self, context: Tensor, query: Tensor, value: Tensor, estimate: Estimate, attention_mask: Tensor | None
    ) -> Tensor:
        """Output = s_mix * sparse context + (1 - s_mix) * average context."""
        if self.causal:
            return ops.mix_average(
                context, value, estimate.mix_scale, attention_mask=attention_mask, backend=self.config.backend
            )
        spans = self._spans(query, value, attention_mask)
        average = estimated_mean(value, estimate.probabilities(), spans, estimate.layout, estimate.shift)
        mix = estimate.mix_scale[..., None].to(context.dtype)
        real = (spans.length > 0)[:, None, :, None]
        return mix * context + (1 - mix) * average * real
