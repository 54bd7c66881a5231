"""Compiled code. It stands beside the package and is imported as ``tinygrad_seq.kernels``.

Whatever is here sees arrays, rule text and plans, whose parts are in ``tinygrad_seq/program.py``,
never a tensor. Importing this package does not import Numba; the modules do that when they are
first needed.
"""
