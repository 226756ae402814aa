import os

import pytest
import torch
from torch.utils._device import _device_constructors

# torch notes once which functions make tensors, for `with torch.device(...)`: not while one is replaced below, or
# models built on the meta device by later tests of the process would take real memory
_device_constructors()

if not torch.cuda.is_available():
    # read by triton when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill fresh memory with NaN (or the largest integer), so that an element nobody writes shows up."""

    def poison(function):
        def poisoned(*args, **kwargs):
            tensor = function(*args, **kwargs)
            if tensor.device.type == "meta" or type(tensor) is not torch.Tensor:
                return tensor
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)

        return poisoned

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
