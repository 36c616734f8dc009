"""Recording what every attention layer of a model saw and gave, for distillation, monitoring and pictures."""

from collections.abc import Callable

from transformers import PreTrainedModel

from .families import attention_modules
from .interface import IMPLEMENTATION, LayerRecord

__all__ = ["AttentionRecorder", "LayerRecord"]


class AttentionRecorder:
    """Context manager that records every self-attention layer of one model instance, dense or converted.

    A dense model runs its attention through ``scaled_dot_product_attention`` meanwhile. On exit the model is as before.
    ``records`` holds the layers of the forward passes since ``clear()``, first layer first.

    Args:
        model: the model to record.
        keep: called with every layer's record, right after its attention, in place of adding it to ``records``.
        log_sums: whether layers with plain attention record their log-sum-exps where they can. On a GPU their contexts
            may then differ by half precision's rounding from those without a recorder.
    """

    def __init__(
        self, model: PreTrainedModel, keep: Callable[[LayerRecord], None] | None = None, *, log_sums: bool = False
    ) -> None:
        self.model = model
        self.records: list[LayerRecord] = []
        self.keep = self.records.append if keep is None else keep
        self.log_sums = log_sums

    def __enter__(self) -> "AttentionRecorder":
        self._modules = attention_modules(self.model)
        if any(hasattr(module, "attention_recorder") for module in self._modules):
            raise RuntimeError("model is being recorded already: leave the other AttentionRecorder first")
        self._implementation = self.model.config._attn_implementation
        if self._implementation != IMPLEMENTATION:  # to set one, transformers walks all modules
            self.model.set_attn_implementation(IMPLEMENTATION)
        for module in self._modules:
            module.attention_recorder = self
        return self

    def __exit__(self, *exception: object) -> None:
        for module in self._modules:
            del module.attention_recorder
        if self._implementation != IMPLEMENTATION:
            self.model.set_attn_implementation(self._implementation)

    def clear(self) -> None:
        """Forget the records, and with them the tensors that they keep alive."""
        self.records.clear()
