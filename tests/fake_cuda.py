"""Fake CUDA tensors: what they can do without a GPU depends on torch."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode


def _can_be_indexed() -> bool:
    with FakeTensorMode():
        try:
            torch.zeros(1, 1, device="cuda")[..., 0] = 0
        except RuntimeError:  # torch 2.9 asks for a driver
            return False
    return True


needs_indexing = pytest.mark.skipif(
    not _can_be_indexed(), reason=f"torch {torch.__version__} asks for a driver where a fake CUDA tensor is indexed"
)
