"""Modules for sequence models: cells, layers, losses, initialisers. The public names."""

from tinygrad_seq.nn import functional, init
from tinygrad_seq.nn.cells import GRUCell, Head, LSTMCell, RNNCell
from tinygrad_seq.nn.convolution import AvgPool1d, BatchNorm1d, Conv1d, GlobalPool1d, MaxPool1d
from tinygrad_seq.nn.gates import Gate
from tinygrad_seq.nn.layers import Dropout, Embedding, LayerNorm, Linear, Sequential
from tinygrad_seq.nn.module import Module, functional_call, parameter
from tinygrad_seq.nn.one_step import Stack, as_cell
from tinygrad_seq.nn.recurrent import GRU, LSTM, RNN, Recurrent
from tinygrad_seq.nn.sequence_to_sequence import Seq2Seq

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "AvgPool1d",
    "BatchNorm1d",
    "Conv1d",
    "Dropout",
    "Embedding",
    "GRUCell",
    "Gate",
    "GlobalPool1d",
    "Head",
    "LSTMCell",
    "LayerNorm",
    "Linear",
    "MaxPool1d",
    "Module",
    "RNNCell",
    "Recurrent",
    "Seq2Seq",
    "Sequential",
    "Stack",
    "as_cell",
    "functional",
    "functional_call",
    "init",
    "parameter",
]
