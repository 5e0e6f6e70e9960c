"""What the kernels reach beside the alternatives: cases, inputs, check, timings, report, plot. ``run.Bench`` does it.

This package imports nothing heavy, so that ``sparsek-tune --help`` stays quick.
"""
