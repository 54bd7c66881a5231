"""Structures of tensors: a tensor, or tuples, NamedTuples, lists and dicts of them.

Arguments of transforms, inputs and outputs of cells, and states have such structures.
Imports errors alone, and knows nothing of tensors but that they are the leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tinygrad_seq.errors import ShapeError


def paths(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf with its path, such as ``[1].h`` or ``['x']``, in a fixed order."""
    if isinstance(tree, (tuple, list)):
        names = getattr(tree, "_fields", None)
        for k, branch in enumerate(tree):
            yield from paths(branch, f"{path}.{names[k]}" if names else f"{path}[{k}]")
    elif isinstance(tree, dict):
        for key in _keys(tree):
            yield from paths(tree[key], f"{path}[{key!r}]")
    else:
        yield path, tree


def leaves(tree: Any) -> list[Any]:
    """Every leaf, in the order of ``paths``."""
    if not isinstance(tree, (tuple, list)):
        if not isinstance(tree, dict):
            return [tree]
        tree = [tree[key] for key in _keys(tree)]
    flat: list[Any] = []
    for branch in tree:
        if isinstance(branch, (tuple, list, dict)):
            flat += leaves(branch)
        else:  # without a call of its own
            flat.append(branch)
    return flat


def _keys(tree: dict[Any, Any]) -> list[Any]:
    """Two dicts with the same keys have the same structure, in whatever order they were made."""
    return sorted(tree, key=str)


def rebuild(like: Any, values: Iterator[Any]) -> Any:
    """The structure of ``like`` with its leaves taken from ``values`` in order."""
    if not isinstance(like, (tuple, list, dict)):
        return next(values)
    if isinstance(like, dict):
        made = {key: rebuild(like[key], values) for key in _keys(like)}
        return {key: made[key] for key in like}
    branches = [
        rebuild(branch, values) if isinstance(branch, (tuple, list, dict)) else next(values)
        for branch in like  # a leaf has no call of its own
    ]
    return type(like)(*branches) if hasattr(like, "_fields") else type(like)(branches)


def map_leaves(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """``function`` of the leaves of trees of one structure, in that structure."""
    for other in others:
        check_same(tree, other, "map_leaves")
    return rebuild(tree, map(function, leaves(tree), *map(leaves, others)))


def map_arrays(function: Callable[[Any], Any], data: Any) -> Any:
    """``function`` of each array in tuples and dicts of them, where a list is an array too."""
    if isinstance(data, dict):
        return {key: map_arrays(function, value) for key, value in data.items()}
    if isinstance(data, tuple):
        inner = [map_arrays(function, value) for value in data]
        return type(data)(*inner) if hasattr(data, "_fields") else tuple(inner)
    return function(data)


def map_columns(function: Callable[[list[Any]], Any], trees: list[Any]) -> Any:
    """``function`` of the list of leaves in each place of trees of one structure."""
    columns = zip(*map(leaves, trees), strict=True)
    return rebuild(trees[0], iter([function(list(column)) for column in columns]))


def check_same(expected: Any, given: Any, what: str) -> None:
    """Raise a ShapeError unless both have the same structure."""
    wanted, found = structure(expected), structure(given)
    if wanted != found:
        raise ShapeError(f"{what}: {found} was given, expected {wanted}")


def structure(tree: Any) -> str:
    """A tree's structure in words: ``a tensor``, ``(a tensor, a tensor)``, ``{'x': a tensor}``."""
    if isinstance(tree, (tuple, list)):
        inner = ", ".join(map(structure, tree))
        if hasattr(tree, "_fields"):
            return f"{type(tree).__name__}({inner})"
        return f"({inner}{',' * (len(tree) == 1)})" if isinstance(tree, tuple) else f"[{inner}]"
    if isinstance(tree, dict):
        return "{" + ", ".join(f"{key!r}: {structure(tree[key])}" for key in _keys(tree)) + "}"
    return "a tensor" if tree is not None else "None"
