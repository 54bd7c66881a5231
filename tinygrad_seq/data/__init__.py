"""Sequences as training data: windows, batches, padding, CSV columns. The public names."""

from tinygrad_seq.data.batches import Batches, train_test_split
from tinygrad_seq.data.sequences import pad_sequences, windows
from tinygrad_seq.data.tables import read_column

__all__ = ["Batches", "pad_sequences", "read_column", "train_test_split", "windows"]
