"""Compiled code. It stands beside the package and is imported as ``tinygrad_seq.kernels``.

Whatever is here sees arrays, plans and rule text, never a tensor. Importing this package does not
import Numba; the modules do that when they are first needed.
"""
