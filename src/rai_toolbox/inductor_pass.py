"""What inductor is told about a step: in which order, and which values to keep in memory where."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import (
    CustomGraphPass,
    get_custom_graph_passes,
    get_hash_for_files,
)
from torch.fx import Graph, Node

_COPY = torch.ops.aten.copy_.default
_OPERATOR = torch.ops.higher_order.auto_functionalized_v2
_SHARED = 8  # elements, at least, that use a value for it to be worth a place in memory
_LARGE = 2**12  # elements; a place in memory takes a loop of its own, and threads meet after it


def inductor(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """The backend of that name for `torch.compile`, with the pass below after its own."""
    name = "post_grad_custom_post_pass"
    passes = [*get_custom_graph_passes(getattr(config, name)), InductorPass()]
    made: Any = compile_fx(module, inputs, config_patches={name: passes})
    return made  # type: ignore[no-any-return]


class InductorPass(CustomGraphPass):
    """The three below, in a row; for `torch.compile`, where the values are on CPU."""

    def __call__(self, graph: Graph) -> None:  # noqa: D102
        if _writes_at_the_end(graph):
            one_by_one(graph)
            write_early(graph)
        keep_small_values(graph)

    def uuid(self) -> Any:  # noqa: D102
        return get_hash_for_files((__file__,))


def one_by_one(graph: Graph) -> None:
    """Bring what is done to a parameter together, as all of them were transformed, then stepped.

    Inductor joins no loops that are far from each other in the graph.
    """
    nodes = list(graph.nodes)
    copies = [node for node in nodes if node.target is _COPY]
    # A copy may come once what it writes is known, and what it writes over is not needed any more.
    needed = {copy: {copy.args[1], *_readers(copy.args[0])} for copy in copies}
    placed: dict[Node, None] = {}
    for last in (*copies, nodes[-1]):
        placed |= dict.fromkeys(_before(last))
        for copy in copies:
            if copy not in placed and needed[copy] <= placed.keys():
                placed[copy] = None
    if needed.keys() <= placed.keys():
        for node in placed:
            if node.op != "placeholder":
                nodes[-1].prepend(node)


def write_early(graph: Graph) -> None:
    """Keep a parameter between its update and its projection where it is, in its own memory.

    Where norms are read of an updated parameter before it is scaled, inductor keeps it in memory
    of its own until the step ends: that of all parameters together, for most of the time new
    memory, which is slower to touch than all else is. From the last read of the old parameter on,
    its memory can be written to.
    """
    place = {node: i for i, node in enumerate(graph.nodes)}
    copies = [node for node in graph.nodes if node.target is _COPY]
    results = {copy.args[1] for copy in copies}
    for copy in copies:
        param, result = copy.args[:2]
        if not isinstance(param, Node) or not isinstance(result, Node):
            continue
        free = max((place[reader] for reader in _readers(param)), default=-1)
        found = [
            node
            for node in _before(result)
            if place.get(node, -1) >= free and node not in results and _may_be_kept(node, param)
            if all(place[reader] < place[copy] for reader in _readers(node))
        ]
        if found:
            _write_after(max(found, key=place.__getitem__), param)


def keep_small_values(graph: Graph) -> None:
    """Keep numbers of tensors and of rows in memory where loops over elements use them.

    Inductor would write the arithmetic that leads to them into these loops, to be done again for
    every vector of elements, such as Adam's two powers of a number, which take more time than all
    the rest. They are marked as torch's own passes mark what is to have certain strides.
    """
    for node in graph.nodes:
        value = _value(node)
        if value is None or not node.all_input_nodes:  # (a constant is best where it is used)
            continue
        sizes = [of_user.numel() for of_user in map(_value, node.users) if of_user is not None]
        if sizes and max(sizes) >= max(_LARGE, _SHARED * value.numel()):
            node.meta["inductor_realize_to_strides"] = True


def _writes_at_the_end(graph: Graph) -> bool:
    """Whether memory is written to at the end only, as torch's functionalization leaves it."""
    nodes = list(graph.nodes)
    copies = {node for node in nodes if node.target is _COPY}
    calls = [node for node in nodes if node.op == "call_function" and node not in copies]
    at_the_end = copies == set(nodes[len(nodes) - 1 - len(copies) : -1])
    return at_the_end and not any(node.is_impure() for node in calls)


def _before(last: Node) -> list[Node]:
    """What leads to a node, each after what leads to it."""
    found: dict[Node, None] = {}
    todo = [(last, iter(last.all_input_nodes))]
    while todo:
        node, inputs = todo[-1]
        new = next((before for before in inputs if before not in found), None)
        if new is not None:
            todo.append((new, iter(new.all_input_nodes)))
            continue
        todo.pop()
        if node is not last:
            found[node] = None
    return list(found)


def _readers(param: Any) -> set[Node]:
    """What reads the memory of a parameter, also by views of it."""
    readers: set[Node] = set()
    views = [param]
    while views:
        for user in views.pop().users:
            if user.target is not _COPY and user not in readers:
                readers.add(user)
                if _shares_memory(user, param):
                    views.append(user)
    return readers


def _shares_memory(node: Node, param: Node) -> bool:
    """Whether a node may be a view of a parameter; several values at once count as such."""
    a, b = node.meta.get("val"), param.meta.get("val")
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return True
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


def _may_be_kept(node: Node, param: Node) -> bool:
    """Whether a node is to be held in memory, and that of a parameter is fit for it."""
    a, b = _value(node), _value(param)
    if a is None or b is None or node.op != "call_function" or param.op != "placeholder":
        return False
    if a.shape != b.shape or a.stride() != b.stride() or a.dtype != b.dtype:
        return False
    if any(user.target is _OPERATOR for user in node.users):  # which is to write to it
        return len(node.users) == 1 and _is_written_whole(node)
    return len(node.users) > 1 and _is_reduced(node, a.numel())


def _is_reduced(node: Node, size: int) -> bool:
    """Whether there is a value of fewer elements that comes from elements of this one."""
    return any(_SHARED * value.numel() <= size for value in _values_after(node, size))


def _values_after(node: Node, size: int) -> Iterator[Tensor]:
    """Values that come from those of a node; none behind those that are smaller."""
    seen: set[Node] = set()
    todo = list(node.users)
    while todo:
        user = todo.pop()
        value = _value(user)
        if user in seen or value is None:
            continue
        seen.add(user)
        yield value
        if value.numel() >= size:
            todo += user.users


def _write_after(node: Node, param: Node) -> None:
    """Write a value to the memory of a parameter once it is known, and read it there only."""
    with node.graph.inserting_after(node):
        written = node.graph.call_function(_COPY, (param, node))
    written.meta = dict(param.meta)
    for user in [user for user in node.users if user is not written]:
        # (an operator writes in place to parameters only)
        user.replace_input_with(node, param if user.target is _OPERATOR else written)


def _value(node: Node) -> Tensor | None:
    """What a node is, on CPU and of a shape that is known."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.device.type != "cpu":
        return None
    return value if isinstance(value.numel(), int) else None


def _is_written_whole(node: Node) -> bool:
    """Whether an operator writes to a node itself, not to a view of it, as to one of two slices."""
    views = ("_size", "_stride", "_storage_offset", "_slice_dim", "_slice_start", "_alias")
    (user,) = node.users
    return not any(name.endswith(views) for name in user.kwargs)
