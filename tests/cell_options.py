"""Cells with options chosen at random, against plain NumPy and one driver against the other.

``python tests/cell_options.py SEED COUNT`` tries so many; without Numba's compiler
(``NUMBA_DISABLE_JIT=1``) that is a matter of seconds.
"""

from __future__ import annotations

import sys
import traceback
from typing import Any

import numpy as np

import tinygrad_seq as tgs
from tinygrad_seq import nn
from tinygrad_seq.trees import leaves

Array = np.ndarray
FUNCTIONS = {
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "tanh": np.tanh,
    "relu": lambda z: np.maximum(z, 0),
    "softplus": lambda z: np.logaddexp(0, z),
    "silu": lambda z: z / (1 + np.exp(-z)),
    "hard_sigmoid": lambda z: np.clip(z / 6 + 0.5, 0, 1),
    "linear": lambda z: z,
}


def normed(z: Array, p: dict[str, Array], name: str) -> Array:
    """Mean 0 and variance 1 along a row, then γ and β, if the cell has them."""
    if f"{name}.weight" not in p:
        return z
    made = np.empty_like(z)
    for b, row in enumerate(z):
        made[b] = (row - row.mean()) / np.sqrt(row.var() + 1e-5) * p[f"{name}.weight"]
    return made + p.get(f"{name}.bias", 0.0)


def bounded(z: Array, options: dict[str, Any]) -> Array:
    bound = options.get("clip")
    return z if bound is None else np.clip(z, -bound, bound)


def mixed(new: Array, old: Array, options: dict[str, Any], leaf: int = 0) -> Array:
    """Zoneout in use: the mean of what happens in training."""
    p = options.get("zoneout", 0.0)
    p = p[leaf] if isinstance(p, tuple) else p
    return p * old + (1 - p) * new


def function(options: dict[str, Any], gate: str, usual: str) -> Any:
    return FUNCTIONS[options.get("activations", {}).get(gate, usual)]


def rnn(p: dict[str, Array], x: Array, state: list[Array], options: dict[str, Any]) -> list[Array]:
    (h,) = state
    z = normed(x @ p["weight_ih"].T, p, "norm_ih") + normed(h @ p["weight_hh"].T, p, "norm_hh")
    act = FUNCTIONS[options.get("nonlinearity", "tanh")]
    return [mixed(bounded(act(z + p.get("bias", 0.0)), options), h, options)]


def lstm(p: dict[str, Array], x: Array, state: list[Array], options: dict[str, Any]) -> list[Array]:
    h, c = state
    H = c.shape[1]
    z = normed(x @ p["weight_ih"].T, p, "norm_ih") + normed(h @ p["weight_hh"].T, p, "norm_hh")
    z = z + p.get("bias", 0.0)
    names = "fgo" if options.get("coupled") else "ifgo"
    gate = {name: z[:, k * H : (k + 1) * H] for k, name in enumerate(names)}
    seeing = names.replace("g", "")
    peep = dict.fromkeys("ifo", 0.0)
    if "weight_peephole" in p:
        parts = p["weight_peephole"].reshape(len(seeing), H)
        peep |= {name: parts[k] for k, name in enumerate(seeing)}
    f = function(options, "f", "sigmoid")(gate["f"] + peep["f"] * c)
    i = 1 - f
    if "i" in gate:
        i = function(options, "i", "sigmoid")(gate["i"] + peep["i"] * c)
    new_c = bounded(f * c + i * function(options, "g", "tanh")(gate["g"]), options)
    o = function(options, "o", "sigmoid")(gate["o"] + peep["o"] * new_c)
    new_h = o * function(options, "h", "tanh")(normed(new_c, p, "norm_c"))
    if "weight_hr" in p:
        new_h = new_h @ p["weight_hr"].T
    return [mixed(new_h, h, options, 0), mixed(new_c, c, options, 1)]


def gru(p: dict[str, Array], x: Array, state: list[Array], options: dict[str, Any]) -> list[Array]:
    (h,) = state
    H = h.shape[1]
    W, U = p["weight_ih"], p["weight_hh"]
    r_act, z_act, n_act = (
        function(options, name, usual)
        for name, usual in (("r", "sigmoid"), ("z", "sigmoid"), ("n", "tanh"))
    )
    from_x = normed(x @ W.T, p, "norm_ih") + p.get("bias", 0.0)
    if options.get("reset_after"):
        from_h = normed(h @ U.T, p, "norm_hh") + p.get("bias_hh", 0.0)
        r = r_act(from_x[:, :H] + from_h[:, :H])
        z = z_act(from_x[:, H : 2 * H] + from_h[:, H : 2 * H])
        n = n_act(from_x[:, 2 * H :] + r * from_h[:, 2 * H :])
    else:
        from_h = normed(h @ U[: 2 * H].T, p, "norm_hh")
        r = r_act(from_x[:, :H] + from_h[:, :H])
        z = z_act(from_x[:, H : 2 * H] + from_h[:, H:])
        n = n_act(from_x[:, 2 * H :] + normed((r * h) @ U[2 * H :].T, p, "norm_n"))
    return [mixed(bounded((1 - z) * h + z * n, options), h, options)]


KINDS = {"rnn": (nn.RNNCell, rnn), "lstm": (nn.LSTMCell, lstm), "gru": (nn.GRUCell, gru)}


def chosen(rng: np.random.Generator, kind: str) -> dict[str, Any]:
    """Options of a cell, each with probability one half."""

    def flag() -> bool:
        return bool(rng.random() < 0.5)

    def any_function() -> str:
        return str(rng.choice(list(FUNCTIONS)))

    options: dict[str, Any] = {"bias": flag() or flag(), "layer_norm": flag()}
    if flag():
        options["clip"] = float(rng.uniform(0.3, 1))
    if flag():
        options["zoneout"] = float(rng.uniform(0, 0.9))
    if flag():
        options["recurrent_dropout"] = float(rng.uniform(0.1, 0.7))
    if kind == "rnn":
        return options | {"nonlinearity": any_function()}
    names = {"lstm": "ifgoh", "gru": "rzn"}[kind]
    options["activations"] = {name: any_function() for name in names if rng.random() < 0.3}
    if options["bias"] and flag():
        options["chrono"] = int(rng.integers(2, 50))
    if kind == "gru":
        return options | {"reset_after": flag()}
    options |= {"peephole": flag(), "coupled": flag()}
    if flag():
        options["projection_size"] = int(rng.integers(1, 5))
    if "zoneout" in options and flag():
        options["zoneout"] = (options["zoneout"], float(rng.uniform(0, 0.9)))
    return options


def compare(seed: int) -> str | None:
    """What is wrong with the cell of this seed; None if nothing is."""
    rng = np.random.default_rng(seed)
    kind = str(rng.choice(list(KINDS)))
    options = chosen(rng, kind)
    make, step = KINDS[kind]
    T, B, I, H = (int(rng.integers(1, n)) for n in (7, 5, 5, 6))
    cell = make(I, H, **options, dtype="float64", rng=rng)
    for parameter in cell.parameters():  # those that start at 0 or 1 too
        parameter.data = parameter.numpy() + 0.3 * rng.standard_normal(parameter.shape)
    values = {name: parameter.numpy() for name, parameter in cell.named_parameters()}
    xs = rng.standard_normal((T, B, I))
    start = [rng.standard_normal(leaf.shape) for leaf in leaves(cell.initial_state(B))]

    def run(drive: Any) -> list[Array]:
        tgs.manual_seed(seed)
        given = [tgs.tensor(a, requires_grad=True) for a in (xs, *start)]
        state = tuple(given[1:]) if len(start) > 1 else given[1]
        results = leaves(drive(cell, given[0], state))
        cell.zero_grad()
        loss = tgs.tensor(0.0, "float64")
        for k, result in enumerate(results):
            loss = loss + tgs.sum(result * np.cos(k + np.arange(result.size).reshape(result.shape)))
        loss.backward()
        moved = [t for t in (*given, *cell.parameters()) if t.grad is not None]
        return [*(r.numpy() for r in results), *(t.grad.numpy() for t in moved)]

    cell.eval()
    now, ys = start, []
    for x in xs:
        now = step(values, x, now, options)
        ys.append(now[0])
    for name, (mode, a, b) in {
        "unroll in use against NumPy": (False, lambda: run(tgs.unroll), lambda: [ys, *now]),
        "scan in use against unroll": (False, lambda: run(tgs.scan), lambda: run(tgs.unroll)),
        "scan in training against unroll": (True, lambda: run(tgs.scan), lambda: run(tgs.unroll)),
    }.items():
        cell.train(mode)
        found, expected = a(), b()
        if "NumPy" not in name and len(found) != len(expected):
            return f"{kind} {options}: {name}: {len(found)} values, not {len(expected)}"
        for k, (f, e) in enumerate(zip(found, expected, strict=False)):
            if not np.allclose(f, e, rtol=1e-8, atol=1e-9):
                return f"{kind} {options}, {T=} {B=} {I=} {H=}: {name}: value {k}"
    return None


def main(first: int, count: int) -> int:
    failed = 0
    for seed in range(first, first + count):
        try:
            with np.errstate(over="ignore"):
                problem = compare(seed)
        except Exception:
            problem = traceback.format_exc()
        if problem is not None:
            failed += 1
            print(f"seed {seed}: {problem}\n", flush=True)
    print(f"{count} cells, {failed} disagree")
    return failed


if __name__ == "__main__":
    sys.exit(bool(main(int(sys.argv[1]), int(sys.argv[2]))))
