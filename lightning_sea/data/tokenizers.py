"""Loading tokenizers and checking, before training, what the data modules and the model need of each other."""

from datasets.fingerprint import Hasher
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from ..families import max_positions
from .embedded import resolve_model


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model: a hub name, a local folder, or an embedded model such as "embedded:lm"."""
    return AutoTokenizer.from_pretrained(resolve_model(name))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what the tokenizer does, equal in every process.

    It is taken before the first call, because calls leave their truncation in a fast tokenizer's state.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return Hasher.hash((type(tokenizer).__name__, content, tokenizer.special_tokens_map, tokenizer.truncation_side))


def require_token(tokenizer: PreTrainedTokenizerBase, which: str, name: str, reason: str) -> int:
    """The id of a special token ("pad", "eos").

    Raises ValueError if the tokenizer has none; ``name`` and ``reason`` say in the message whose it is and what it is
    for.
    """
    token_id = getattr(tokenizer, f"{which}_token_id")
    if token_id is None:
        raise ValueError(
            f"the tokenizer of {name!r} has no {which} token, which {reason}; set tokenizer.{which}_token and save it "
            f"beside the model"
        )
    return token_id


def check_positions(length: int, config: PretrainedConfig, argument: str) -> None:
    """Raise ValueError if sequences of ``length`` tokens (the data's ``argument``) do not fit the model's positions."""
    positions = max_positions(config)
    if positions is not None and length > positions:
        raise ValueError(f"{argument} is {length}, but the model ({config.model_type}) has only {positions} positions")
