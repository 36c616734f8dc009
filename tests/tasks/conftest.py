"""Fixtures of the training tests."""

import pytest
from tiny import save_bert, save_llama

from lightning_sea.config import SEAConfig


@pytest.fixture(scope="session")
def bert_dir(tmp_path_factory) -> str:
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory) -> str:
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def sea() -> SEAConfig:
    """All trainable parts, small; no random jitter."""
    return SEAConfig(k=4, predictor_length=32, decoder="conv", jitter_probability=0.0)
