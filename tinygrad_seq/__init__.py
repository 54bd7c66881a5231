"""tinygrad_seq: a tape, and recurrent networks on it. The public names, nothing else."""

from tinygrad_seq import data, nn, optim, train
from tinygrad_seq.creation import (
    arange,
    eye,
    full,
    manual_seed,
    ones,
    rand,
    randn,
    tensor,
    zeros,
)
from tinygrad_seq.elementwise import (
    abs,
    add,
    clip,
    cos,
    divide,
    elu,
    erf,
    exp,
    expm1,
    gelu,
    leaky_relu,
    log,
    log1p,
    maximum,
    minimum,
    multiply,
    negative,
    power,
    relu,
    sigmoid,
    sign,
    silu,
    sin,
    softplus,
    sqrt,
    square,
    subtract,
    tanh,
    where,
)
from tinygrad_seq.errors import ShapeError, TapeError, TraceError
from tinygrad_seq.recurrence import unroll
from tinygrad_seq.structural import (
    astype,
    broadcast_to,
    concat,
    cumsum,
    expand_dims,
    flip,
    log_softmax,
    logsumexp,
    matmul,
    max,
    mean,
    min,
    pad,
    permute_dims,
    reshape,
    softmax,
    split,
    squeeze,
    stack,
    sum,
    take,
    take_along_axis,
    var,
)
from tinygrad_seq.tape import Tape, no_grad
from tinygrad_seq.tensors import Tensor
from tinygrad_seq.transforms import grad, gradcheck, jvp, value_and_grad, vjp

__version__ = "0.1.0"
