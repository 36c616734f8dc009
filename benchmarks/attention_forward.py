"""Time and memory of one attention layer, forward: SEA against dense attention and a sliding window. Needs a GPU.

    python benchmarks/attention_forward.py --model models/SmolLM2-135M --text data/quality/validation.tokens

Everything between the host's projections is timed: q, k, v in, context out. How much neighbouring rows agree decides
how much work they share. So causal inputs are those of a pretrained language model on text (``recorded.py``), heads
from all over its layers; without ``--model``, and for bidirectional layers, they are synthetic and smooth (see
``measure.smooth``), whose rows agree much less. Errors are checked first, against float64.

Methods: "sdpa" (the faster of flash and cuDNN), "sea" (``FORMS`` of it; with a model also with budgets that its heads
share by need, ``head_budgets``), "sea_paper" (the published form: linear attention and convolutions, whose masks are
those of random weights), "flex_window" (FlexAttention), "eager". ``ms`` is a call from Python; ``graph_ms`` is the same
work replayed from a CUDA graph, which is what the device needs by itself.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from attention_methods import FUSED, WINDOW, Attention, eager, flex_window, sdpa
from attention_stages import stages_ms
from measure import ROOT, report_head, smooth, time_and_memory, write_report
from recorded import Recorded
from torch import Tensor

from lightning_sea.attention import SEAAttention
from lightning_sea.budgets import allocate, errors_and_keys
from lightning_sea.config import SEAConfig
from lightning_sea.recorder import LayerRecord
from sea_kernels import far_field_attention, sparse_attention

HEAD_DIM = 64
SCALING = HEAD_DIM**-0.5
BIDIRECTIONAL_HEADS, BIDIRECTIONAL_BINS, BIDIRECTIONAL_LONGEST = 12, 128, 32768  # BERT-base
MAX_ERROR_RATIO = 2.0
FORMS = {
    "default": {},
    "two_looks": {"k": 64, "first_look_ratio": 8},
}
BUDGETS_LENGTH = 8192  # of the input that heads' budgets come from


@dataclass(frozen=True)
class Form:
    """A SEA layer that is measured; ``error_ratio`` is that of its kernels."""

    method: str
    config: SEAConfig
    head_budgets: bool = False
    error_ratio: float | None = None


def sea_forms(causal: bool, forms: list[str], strides: list[int], budgets: bool) -> Iterator[Form]:
    """Every SEA layer that is measured, with ``budgets`` also those whose heads have budgets of their own."""
    width = {} if causal else {"predictor_length": BIDIRECTIONAL_BINS}
    paper = SEAConfig.paper_opt if causal else SEAConfig.paper_bert
    for stride in strides if causal else [1]:
        for form in forms:
            config = SEAConfig(query_stride=stride, **FORMS[form], **width)
            yield from (Form("sea", config, shared) for shared in ((False, True) if budgets else (False,)))
        yield Form("sea_paper", paper(query_stride=stride))


def sea_layer(config: SEAConfig, heads: int, causal: bool) -> SEAAttention:
    layer = SEAAttention(config, num_heads=heads, num_kv_heads=heads, head_dim=HEAD_DIM, causal=causal)
    return layer.cuda().bfloat16().eval().requires_grad_(False)


@torch.no_grad()
def shares(layer: SEAAttention, recorded: Recorded) -> Tensor:
    """Shares of the heads in the budget of keys, as a model's heads get them: ``[H]``."""
    query, key, value = recorded.inputs(BUDGETS_LENGTH)
    context = sdpa("cudnn", causal=True)(query, key, value).transpose(1, 2)
    record = LayerRecord(query, key, value, context, SCALING, None, True, None)
    errors, keys = errors_and_keys(layer, record)[:, None].cpu()
    return allocate(errors, keys)[0]


def error_ratio(config: SEAConfig, causal: bool, heads: int = 4, seq_len: int = 1000) -> float:
    """Error of attention in bf16 kernels over that of the same formula in PyTorch's bf16, both against float64."""
    query, key, value = (smooth(heads, seq_len, HEAD_DIM) for _ in range(3))
    layer = sea_layer(config, heads, causal)
    estimate = layer.estimate(query, key, value, scaling=SCALING, with_scores=False)
    place = {"causal": causal, "scaling": SCALING}
    operation, masks = sparse_attention, [estimate.mask]
    if config.average_context == "far":
        place["centre"] = 0.3 * torch.randn(heads, HEAD_DIM, device=query.device)
        operation, masks = far_field_attention, [estimate.mask, estimate.coarse]
    exact = operation(query.double(), key.double(), value.double(), *masks, backend="reference", **place)
    ours = operation(query, key, value, *masks, backend="triton", **place)
    eye = torch.eye(seq_len, device=query.device).expand(1, heads, -1, -1)  # attention to one-hot values: its weights
    weights = operation(query.float(), key.float(), eye, *masks, backend="reference", **place)
    if operation is sparse_attention:  # the formula in bf16: scores, softmax and values, each rounded
        scores = ((query @ key.mT) * SCALING).masked_fill(weights == 0, float("-inf"))
        plain = scores.softmax(-1).nan_to_num() @ value  # rows that keep nothing are zero
    else:  # its weights are no softmax of q . k: round them as bf16 attention rounds its own
        plain = weights.bfloat16() @ value
    return round(float((ours.double() - exact).norm() / (plain.double() - exact).norm()), 3)


class Comparison:
    """All methods at one number of heads, length after length.

    Args:
        causal: whether rows see only earlier keys.
        heads: query heads, and key heads.
        forms: the SEA layers.
        others: further methods, of "eager" and "flex_window".
        recorded: whose inputs are taken; None takes synthetic ones.
    """

    def __init__(
        self,
        causal: bool,
        heads: int,
        forms: list[Form],
        others: list[str],
        recorded: Recorded | None,
    ) -> None:
        self.causal, self.heads, self.forms, self.others = causal, heads, forms, list(others)
        self.recorded = recorded
        self.shares: dict[Form, Tensor] = {}

    def inputs(self, seq_len: int) -> list[Tensor]:
        """Query, key and value."""
        if self.recorded:
            return self.recorded.inputs(seq_len)
        return [smooth(self.heads, seq_len, HEAD_DIM) for _ in range(3)]

    def rows(self, seq_len: int) -> list[dict]:
        """One row per method, printed."""
        inputs = self.inputs(seq_len)
        rows = [self._sdpa_row(inputs)]
        rows += [self._sea_row(form, inputs) for form in self.forms]
        rows += [self._other_row(name, inputs) for name in list(self.others)]
        common = {"causal": self.causal, "heads": self.heads, "head_dim": HEAD_DIM, "seq_len": seq_len}
        common |= {"dtype": "bfloat16", "inputs": "recorded" if self.recorded else "synthetic"}
        for row in rows:
            row |= common
            row["sdpa_ratio"] = None if row["ms"] is None else round(rows[0]["ms"] / row["ms"], 3)
            print(json.dumps(row), flush=True)
        return rows

    def _sdpa_row(self, inputs: list[Tensor]) -> dict:
        runs = {}
        for backend in FUSED:
            attend = sdpa(backend, self.causal)
            runs[backend] = time_and_memory(lambda attend=attend: attend(*inputs))
        fastest = min(runs, key=lambda backend: runs[backend]["ms"])
        return {"method": "sdpa", "backend": fastest, **runs[fastest]}

    def _sea_row(self, form: Form, inputs: list[Tensor]) -> dict:
        config = form.config
        layer = sea_layer(config, self.heads, self.causal)
        if form.head_budgets:
            if form not in self.shares:
                self.shares[form] = shares(layer, self.recorded)
            layer.budgets.assign(self.shares[form])

        def forward() -> Tensor:
            return layer(*inputs, scaling=SCALING, with_scores=False)[0]

        knobs = "k", "predictor_length", "query_stride", "first_look_ratio", "second_look_width", "average_context"
        row = {"method": form.method, **{knob: getattr(config, knob) for knob in knobs}}
        row |= {"head_budgets": form.head_budgets, "error_ratio": form.error_ratio}
        row |= time_and_memory(forward, graph=form.method == "sea")
        return row | {"stages_ms": None if row["ms"] is None else stages_ms(layer, forward)}

    def _other_row(self, name: str, inputs: list[Tensor]) -> dict:
        seq_len = inputs[0].shape[2]
        attend: Attention = eager(self.causal) if name == "eager" else flex_window(seq_len, self.causal)
        row = {"method": name, **time_and_memory(lambda: attend(*inputs))}
        if row["ms"] is None:  # a longer one would not fit either
            self.others.remove(name)
        return row | ({"k": WINDOW} if name == "flex_window" else {})


def comparisons(args: argparse.Namespace) -> Iterator[tuple[Comparison, list[int]]]:
    """What is compared, and at which lengths. Raises SystemExit if a kernel is not as exact as it must be."""
    for causal, all_heads in ((True, args.heads), (False, [BIDIRECTIONAL_HEADS])):
        budgets = causal and args.model is not None
        forms = [
            replace(form, error_ratio=error_ratio(form.config, causal))
            for form in sea_forms(causal, args.forms, args.strides, budgets)
        ]
        for form in forms:
            if not form.error_ratio <= MAX_ERROR_RATIO:  # nor NaN
                raise SystemExit(f"{form}: its error is too large a multiple of that of PyTorch's half precision")
        lengths = [length for length in args.lengths if causal or length <= BIDIRECTIONAL_LONGEST]
        for heads in all_heads:
            recorded = Recorded(args.model, args.text, heads) if args.model and causal else None
            yield Comparison(causal, heads, forms, args.methods, recorded), lengths


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks/results/attention_forward.json", help="other rows in it stay"
    )
    parser.add_argument("--heads", type=int, nargs="*", default=[32, 12], help="of causal layers; none skips these")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024 * 2**i for i in range(8)])
    parser.add_argument("--methods", nargs="*", default=["eager", "flex_window"], help="besides sea and sdpa")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help="of SEA")
    parser.add_argument("--model", help="transformers directory of a causal language model with heads of 64")
    parser.add_argument("--text", type=Path, help="text for the model, of as many tokens as the longest input")
    parser.add_argument("--strides", type=int, nargs="+", default=[1, 4], help="values of query_stride")
    args = parser.parse_args()
    if args.model and not args.text:
        parser.error("--model needs --text")
    torch.manual_seed(0)
    report = {**report_head(), "rows": []}
    print(report, flush=True)
    for comparison, lengths in comparisons(args):
        for seq_len in lengths:
            report["rows"] += comparison.rows(seq_len)
            write_report(report, args.output, ("causal", "heads", "seq_len"))


if __name__ == "__main__":
    main()
