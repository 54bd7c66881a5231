"""How the gradient comes about: from one operation to backpropagation through time.

    python examples/read_the_tape.py

Read this file beside what it prints. Each part adds one idea to the one before.
"""

from __future__ import annotations

import numpy as np

import tinygrad_seq as tgs
from tinygrad_seq import nn
from tinygrad_seq.rules import RULES


def heading(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


def one_operation() -> None:
    heading("1. One operation")
    # A tensor that requires a gradient is a leaf. What is computed from it is recorded.
    x = tgs.tensor([0.0, 0.5, 1.0], requires_grad=True)
    with tgs.Tape(x=x) as tape:
        y = tgs.tanh(x)
    print(tape)
    # Each operation has one line of text for each derivative. For tanh, with g the gradient that
    # arrives at the output y:
    print("tanh's derivative ", RULES["tanh"].derivatives["x"])
    # Going backward means to hand g from the output to the input. Here g is ones.
    y.backward(np.ones(3))
    print("x.grad            ", x.grad.numpy())
    print("1 - tanh(x)²      ", 1 - np.tanh(x.numpy()) ** 2)


def chain() -> None:
    heading("2. A chain: dL/dw = dL/da · da/dz · dz/dw")
    x, w = tgs.tensor(2.0), tgs.tensor(0.3, requires_grad=True)
    with tgs.Tape(x=x, w=w) as tape:
        z = w * x
        a = tgs.sigmoid(z)
        loss = (a - 1.0) ** 2
    # The tape is a list in the order in which things were computed. Inputs stand before what is
    # made of them, so walking the list backward visits each operation after all that used it.
    print(tape)
    tape.check()
    loss.backward()
    by_hand = 2 * (a.item() - 1) * a.item() * (1 - a.item()) * x.item()
    print(f"w.grad  {w.grad.item():.6f}   by hand, the product of three factors  {by_hand:.6f}")


def used_again() -> None:
    heading("3. Used more than once: gradients add up")
    w = tgs.tensor(3.0, requires_grad=True)
    with tgs.Tape(w=w) as tape:
        y = w * w + w  # w is used three times
    print(tape)
    y.backward()
    print(f"w.grad = w + w + 1 = {w.grad.item():.0f}")


def three_steps() -> tuple[np.ndarray, np.ndarray]:
    heading("4. Three steps of a recurrent network: backpropagation through time")
    # The same cell at every step: h' = tanh(W x + U h + b). tgs.unroll is a loop of such steps.
    cell = nn.RNNCell(2, 3, dtype="float64", rng=0)
    xs = tgs.randn(3, 1, 2, dtype="float64", rng=1)
    with tgs.Tape(W=cell.weight_ih, U=cell.weight_hh, b=cell.bias) as tape:
        ys, _ = tgs.unroll(cell, xs)
        loss = (ys[2] ** 2).sum()
    print(tape)
    print("The constants are the inputs x of each step and the zero state. The weights W, U and b")
    print("have one line each, and every step points to them; linear(x, W) is x Wᵀ.")
    loss.backward()
    shared = cell.weight_hh.grad.numpy()

    # Now give each step weights of its own, with the same values. The tape can then tell the
    # steps apart, and each copy gets the gradient that its own step contributes.
    copies = [tgs.tensor(cell.weight_hh.detach(), requires_grad=True) for _ in range(3)]
    h = cell.initial_state(1)
    for t, own in enumerate(copies):
        h = tgs.tanh(xs[t] @ cell.weight_ih.T + h @ own.T + cell.bias)
    (h**2).sum().backward()
    by_step = np.stack([own.grad.numpy() for own in copies])
    for t, contribution in enumerate(by_step):
        print(f"dL/dU at step {t}: norm {np.linalg.norm(contribution):.6f}")
    print("Step 0 contributes nothing, since its h is zero; earlier steps contribute less.")
    print(f"largest difference between dL/dU and the sum over the steps: "
          f"{np.abs(shared - by_step.sum(axis=0)).max():.1e}")  # fmt: skip
    return shared, by_step


def gradient_of_gradient() -> None:
    heading("5. Derivatives are operations too")
    # Backward can itself be recorded. tgs.grad does that when it is nested.
    second = tgs.grad(tgs.grad(lambda x: x**3))
    print(f"d²(x³)/dx² at 2 is {second(2.0).item():.0f} = 6·2")
    # And all of it can be checked against central differences.
    print("gradcheck:", tgs.gradcheck(lambda x: tgs.tanh(x) * x, tgs.randn(4, rng=0), order=2))


def main() -> tuple[np.ndarray, np.ndarray]:
    np.set_printoptions(precision=6, suppress=True)
    one_operation()
    chain()
    used_again()
    result = three_steps()
    gradient_of_gradient()
    return result


if __name__ == "__main__":
    main()
