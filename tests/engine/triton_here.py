"""Triton's interpreter, for tests of kernels on a machine without a GPU.

In fp32 only: the interpreter multiplies bf16 matrices wrongly. With a GPU at hand the kernels are
compiled instead, which tests/gpu checks.
"""

from __future__ import annotations

import os

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("the kernels run on the GPU, see tests/gpu", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
pytest.importorskip("triton", "3.9", reason="older interpreters do not run on numpy 2.4")
