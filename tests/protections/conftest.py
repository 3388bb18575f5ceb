"""Small tensors: one thread, whatever else the machine is doing. Networks that know rules are trained once."""

from collections.abc import Iterator

import pytest
import torch

from rule_tasks import Models, write_models


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def language_models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Llamas of two layers."""
    return write_models(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="session")
def encoder_decoders(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """T5s of two layers in each stack."""
    return write_models(tmp_path_factory.mktemp("t5"), "t5")
