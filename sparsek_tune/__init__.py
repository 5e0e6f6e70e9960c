"""SparseK attention: tuned Triton kernels behind torch operators. ``import sparsek_tune.ops`` for the operators."""

from sparsek_tune.captured import capture

__all__ = ["__version__", "capture"]
__version__ = "0.1.0"
