"""SparseK attention: tuned Triton kernels behind torch operators. ``import sparsek_tune.ops`` for the operators."""

__version__ = "0.1.0"
