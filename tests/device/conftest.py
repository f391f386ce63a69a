"""A second device, on which tensors of the host are refused as on a GPU, and which counts copies."""

import pytest
import second_device
import torch


@pytest.fixture(scope="session")
def library():
    if not second_device.can_build():
        pytest.skip("no C++ compiler, or Python's headers are missing")
    return second_device.register()


@pytest.fixture(scope="session")
def device(library) -> torch.device:
    return torch.device(second_device.NAME, 0)


@pytest.fixture
def counted(library):
    """Counts of a call: counted(call) -> (result, counts)."""

    def run(call):
        library.reset()
        result = call()
        return result, library.counts()

    return run
