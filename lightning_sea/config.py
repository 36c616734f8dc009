"""Every knob of SEA, once, with plain types: YAML, command line, checkpoints and saved models all come from here."""

import dataclasses
import warnings
from dataclasses import dataclass
from typing import Any

WINDOW_FIRST_TOKENS = 4  # of every row's k keys with method "window"

_CHOICES = {
    "method": ("sea", "performer", "cosformer", "window"),
    "bins": ("aligned", "relative"),
    "grouping": ("query", "head", "batch", "causal_batch"),
    "pooling": ("none", "mean", "mean_bound"),
    "decoder": ("none", "conv"),
    "upsampling": ("nearest", "subpixel"),
    "average_context": ("none", "mean", "far"),
    "backend": ("auto", "reference", "triton"),
}


@dataclass(frozen=True)
class SEAConfig:
    """How attention is estimated, selected and mixed (SEA, arXiv 2310.01777, section 3, and our additions).

    A method other than "sea" is a baseline without an estimator. It reads the knobs that are named with it, and the
    others have no effect.

    Attributes:
        method: what stands in for softmax attention: "sea"; "performer", linear attention of random features alone
            (feature_ratio, redraw_interval, backend); "cosformer", linear attention of rectified queries and keys that
            decays with distance (horizon); or "window", the first 4 tokens and the keys around a row (k, backend).
        k: keys that a query keeps on average, per head. May be changed after training without a reload.
        predictor_length: width K of the estimated attention row, in bins; a multiple of 32.
        bins: how bins stretch to keys: "aligned" bins of a power of two keys, or the paper's "relative" ones.
        grouping: who competes for the kept bins: "query" (each row alone), "causal_batch" (all heads of a row),
            "head" (all rows of a head) or "batch" (everything in an item); the last two are not causal.
        keep_first: always keep the bin of the first tokens, where attention sinks sit.
        keep_own: always keep the bin that holds the row's own position.
        pooling: score bins by pooled keys: "none", by the "mean" key, or by "mean_bound": mean key and min/max bound.
        decoder: "conv" decodes the linear attention's output into scores as in the paper; "none" leaves the pooled
            scores alone.
        upsampling: how the causal decoder widens K / 4 columns to K: the paper's "nearest", or "subpixel".
        feature_ratio: the linear attention has int(D ln(D) / feature_ratio) random features for head width D.
        redraw_interval: training steps between two draws of the random features; 0 never redraws.
        position_period: longest wavelength, in tokens, of the sinusoids that tell a causal estimator where a key is.
        first_look_ratio: 1 keeps whole bins, as in the paper. Above 1, a first look keeps bins of this many times k
            keys, of which a second look, at short runs, leaves k: the most of few keys, at a price in time.
        second_look_width: keys per run of the second look, a power of two.
        window: keys before a row's own run that the second look always keeps; a multiple of second_look_width.
        query_stride: neighbouring rows that share one estimate, a power of two up to 32; 1 is the paper's.
        average_context: what stands for the keys that are not kept: the "mean" of the values, mixed in by a gate
            (paper); "none"; or "far": their bins enter the softmax, pooled around a learned centre of the head's
            queries. That needs aligned bins and keep_own, and has no gates.
        gate_bias: start of the gates before their sigmoid; 3 starts them at 0.95.
        jitter_probability: share of training batches whose relative bin edges are shifted.
        jitter_keys: largest such shift, in keys.
        horizon: distance in tokens at which the weights of a causal "cosformer" reach 0, at least the longest input.
        backend: implementation of the operations: "auto", "reference" or "triton".

    Raises:
        ValueError: if a value is not allowed; the message names it.
    """

    method: str = "sea"
    k: int = 512
    predictor_length: int = 256
    bins: str = "aligned"
    grouping: str = "query"
    keep_first: bool = True
    keep_own: bool = True
    pooling: str = "mean_bound"
    decoder: str = "none"
    upsampling: str = "subpixel"
    feature_ratio: float = 1.0
    redraw_interval: int = 1000
    position_period: float = 65536.0
    first_look_ratio: int = 1
    second_look_width: int = 2
    window: int = 0
    query_stride: int = 1
    average_context: str = "far"
    gate_bias: float = 3.0
    jitter_probability: float = 0.1
    jitter_keys: float = 0.75
    horizon: int = 2048
    backend: str = "auto"

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {allowed}")
        self._check_numbers()
        if self.method == "sea":
            self._check_estimator()
        if self.method == "window" and self.k < WINDOW_FIRST_TOKENS + 2:
            raise ValueError(
                f"k is {self.k}, expected at least {WINDOW_FIRST_TOKENS + 2} with method='window': the first "
                f"{WINDOW_FIRST_TOKENS} tokens, the row's own and one more"
            )

    def _check_estimator(self) -> None:
        if self.pooling == "none" and self.decoder == "none":
            raise ValueError("pooling and decoder are both 'none': nothing would score the bins")
        if self.average_context == "far" and not (self.bins == "aligned" and self.keep_own):
            raise ValueError(
                f"average_context is 'far' with bins={self.bins!r} and keep_own={self.keep_own}: the far field needs "
                "bins='aligned' and keep_own=True"
            )
        if self.first_look_ratio > 1:
            self._check_second_look()
        elif self.window:
            raise ValueError(
                f"window is {self.window} without a second look: set first_look_ratio above 1, or window to 0"
            )

    def _check_numbers(self) -> None:
        rules = {
            "k": (self.k >= 1, "at least 1"),
            "predictor_length": (
                self.predictor_length >= 32 and self.predictor_length % 32 == 0,
                "a positive multiple of 32",
            ),
            "feature_ratio": (self.feature_ratio > 0, "above 0"),
            "redraw_interval": (self.redraw_interval >= 0, "at least 0"),
            "position_period": (self.position_period > 1, "above 1"),
            "query_stride": (self.query_stride in (1, 2, 4, 8, 16, 32), "a power of two up to 32"),
            "jitter_probability": (0 <= self.jitter_probability <= 1, "between 0 and 1"),
            "jitter_keys": (0 <= self.jitter_keys < 1, "at least 0 and below 1"),
            "first_look_ratio": (self.first_look_ratio >= 1, "at least 1"),
            "window": (self.window >= 0, "at least 0"),
            "horizon": (self.horizon >= 1, "at least 1"),
        }
        for name, (holds, allowed) in rules.items():
            if not holds:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {allowed}")

    def _check_second_look(self) -> None:
        width = self.second_look_width
        if width < 1 or width & (width - 1):
            raise ValueError(f"second_look_width is {width}, expected a power of two")
        if self.bins != "aligned" or self.pooling == "none":
            raise ValueError(
                f"first_look_ratio is {self.first_look_ratio} with bins={self.bins!r} and pooling={self.pooling!r}: "
                "a second look needs bins='aligned' and pooled keys; set first_look_ratio to 1"
            )
        if self.window % width or (self.window and self.window + 2 * width > self.k):
            raise ValueError(
                f"window is {self.window}, expected 0 or a multiple of second_look_width = {width} that leaves "
                f"room for two runs within k = {self.k}"
            )

    @classmethod
    def paper_bert(cls, **changes: Any) -> "SEAConfig":
        """The paper's setting for BERT: K = 128, relative bins, convolutions alone, bins competing over all heads."""
        return cls(**{**_PAPER, "predictor_length": 128, **changes})

    @classmethod
    def paper_opt(cls, **changes: Any) -> "SEAConfig":
        """The paper's setting for OPT: as for BERT with K = 256."""
        return cls(**{**_PAPER, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Plain types, for JSON, YAML and checkpoints."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "SEAConfig":
        """Inverse of ``to_dict``. Keys of later versions are ignored with a warning."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            warnings.warn(f"SEAConfig: ignoring unknown keys {unknown}, written by another version", stacklevel=2)
        return cls(**{name: value for name, value in values.items() if name in known})

    def replace(self, **changes: Any) -> "SEAConfig":
        """A copy with some values changed."""
        return dataclasses.replace(self, **changes)


_PAPER = {
    "k": 64,
    "predictor_length": 256,
    "bins": "relative",
    "grouping": "causal_batch",
    "keep_first": False,
    "keep_own": False,
    "pooling": "none",
    "decoder": "conv",
    "upsampling": "nearest",
    "first_look_ratio": 1,
    "average_context": "mean",
}
