"""Sequences as training data, and tasks made to order. The public names.

Text, tables, sequences, batches and buckets prepare what one has; trajectories, tasks and dates
draw examples from a seed, and say how well one does who knows nothing.
"""

from tinygrad_seq.data.batches import Batches, train_test_split
from tinygrad_seq.data.buckets import Buckets
from tinygrad_seq.data.dates import written_dates
from tinygrad_seq.data.sequences import dense_windows, mask_of, pad_sequences, windows
from tinygrad_seq.data.tables import read_column
from tinygrad_seq.data.tasks import (
    adding_problem,
    copy_memory,
    first_symbol,
    order_of_two,
    parity,
    sequence_sum,
    temporal_order,
)
from tinygrad_seq.data.text import Streams, Vocabulary
from tinygrad_seq.data.trajectories import KINDS, bouncing_ball, kinds_of_trajectory

__all__ = [
    "KINDS",
    "Batches",
    "Buckets",
    "Streams",
    "Vocabulary",
    "adding_problem",
    "bouncing_ball",
    "copy_memory",
    "dense_windows",
    "first_symbol",
    "kinds_of_trajectory",
    "mask_of",
    "order_of_two",
    "pad_sequences",
    "parity",
    "read_column",
    "sequence_sum",
    "temporal_order",
    "train_test_split",
    "windows",
    "written_dates",
]
