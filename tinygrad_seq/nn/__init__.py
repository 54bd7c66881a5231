"""Modules for sequence models: cells, layers, losses, initialisers. The public names."""

from tinygrad_seq.nn import functional, init
from tinygrad_seq.nn.cells import GRUCell, LSTMCell, RNNCell
from tinygrad_seq.nn.layers import Dropout, Embedding, LayerNorm, Linear, Sequential
from tinygrad_seq.nn.module import Module, parameter
from tinygrad_seq.nn.recurrent import GRU, LSTM, RNN, Recurrent

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Dropout",
    "Embedding",
    "GRUCell",
    "LSTMCell",
    "LayerNorm",
    "Linear",
    "Module",
    "RNNCell",
    "Recurrent",
    "Sequential",
    "functional",
    "init",
    "parameter",
]
