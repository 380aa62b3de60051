"""What inductor is told about a step: in which order, and which values to keep in memory where."""

from __future__ import annotations

import operator
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
from torch._ops import OpOverload
from torch.fx import Graph, Node

_COPY, _CLONE = torch.ops.aten.copy_.default, torch.ops.aten.clone.default
_OPERATOR = torch.ops.higher_order.auto_functionalized_v2
_REINPLACED = ("index_put", "scatter", "_foreach")  # names of what torch may let write in place
_REDUCTIONS = {"sum", "mean", "amax", "amin", "any", "all", "linalg_vector_norm"}
_IN_ORDER = {"view", "reshape", "_unsafe_view", "squeeze", "unsqueeze", "fma"}  # and pointwise ones
_SHARED = 8  # elements, at least, that use a value for it to be worth a place in memory
_LARGE = 2**12  # elements; a place in memory takes a loop of its own, and threads meet after it


def inductor(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """The backend of that name for `torch.compile`, with the pass below after its own."""
    name = "post_grad_custom_post_pass"
    passes = [*get_custom_graph_passes(getattr(config, name)), InductorPass()]
    made: Any = compile_fx(module, inputs, config_patches={name: passes})
    return made  # type: ignore[no-any-return]


class InductorPass(CustomGraphPass):
    """The four below, in a row; for `torch.compile`, where the values are on CPU."""

    def __call__(self, graph: Graph) -> None:  # noqa: D102
        if _is_plain(graph):
            copy_before(graph)
            one_by_one(graph)
            write_early(graph)
        keep_small_values(graph)

    def uuid(self) -> Any:  # noqa: D102
        return get_hash_for_files((__file__,))


def copy_before(graph: Graph) -> None:
    """Copy what a parameter was, for another one to become that, before it is written over.

    Torch 2.13 takes such a copy for one that does nothing, and writes to one from the other at
    the end, in the order of the parameters: heavy balls and swaps go wrong.
    """
    copies = [node for node in graph.nodes if node.target is _COPY]
    written = {copy.args[0] for copy in copies}
    for copy in copies:
        param, old = copy.args[:2]
        source = old
        while isinstance(source.target, OpOverload) and _may_share_memory(source):
            source = source.all_input_nodes[0]
        if source in written:
            with graph.inserting_before(copies[0]):
                copied = graph.call_function(_CLONE, (old,))
            copied.meta = dict(old.meta)
            copy.args = (param, copied)


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
    late = len(place)  # that of the copies that are made here, which comes after any other
    copies = [node for node in graph.nodes if node.target is _COPY]
    for copy in copies:
        param, result = copy.args[:2]
        if not isinstance(param, Node) or not isinstance(result, Node):
            continue
        free = max((place.get(reader, late) for reader in _readers(param)), default=-1)
        # (what an operator wrote there is there already; a view of it may be in another order)
        own = {copy} if result.target is operator.getitem else set()
        found = [
            node
            for node in _before(result)
            if node in place and place[node] >= free and _may_be_kept(node, param)
            if all(place.get(reader, late) < place[copy] for reader in _readers(node) - own)
            if _is_elementwise(node, result)
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


def _is_plain(graph: Graph) -> bool:
    """Whether memory is written to at the end only, as torch's functionalization leaves it.

    Each parameter is written to once, and nothing becomes its memory that is not known to be a
    view of it. Torch's own passes, which come later, let some operators write to a parameter, and
    take it for granted that the copies are at the end.
    """
    nodes = list(graph.nodes)
    copies = {node for node in nodes if node.target is _COPY}
    calls = [node for node in nodes if node.op == "call_function" and node not in copies]
    at_the_end = copies == set(nodes[len(nodes) - 1 - len(copies) : -1])
    once = {copy.args[0] for copy in copies if copy.args[0].op == "placeholder"}
    pure = all(_is_known(node.target) and not node.is_impure() for node in calls)
    return at_the_end and len(once) == len(copies) and pure


def _is_known(target: Any) -> bool:
    """Whether torch's later passes let this write to nothing but what an operator of ours does."""
    if not isinstance(target, OpOverload):
        return target in (operator.getitem, _OPERATOR)
    name = target._schema.name
    return target.namespace in ("aten", "prims") and not any(word in name for word in _REINPLACED)


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


def _readers(value: Any) -> set[Node]:
    """What reads the memory of a value, also by views of it; copies of it to elsewhere too."""
    readers: set[Node] = set()
    views = [value]
    while views:
        view = views.pop()
        for user in view.users:
            if user in readers or user.target is _COPY and user.args[1] is not view:
                continue
            readers.add(user)
            if user.target is not _COPY and _may_share_memory(user):
                views.append(user)
    return readers


def _may_share_memory(node: Node) -> bool:
    """Whether a node may be in the memory of what it is made of, such as a view.

    That is told by its operator: what torch notes of its memory is not kept up to date.
    """
    if not isinstance(node.target, OpOverload):
        return True
    return any(result.alias_info is not None for result in node.target._schema.returns)


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


def _is_elementwise(node: Node, result: Node) -> bool:
    """Whether each element of a result is made of the same one of a node, and of reductions.

    Another one, such as of a flipped tensor, would be read where it is written over.
    """
    size = node.meta["val"].numel()
    leads = {*_before(result), result}
    seen: set[Node] = set()
    todo = [user for user in node.users if user in leads]
    while todo:
        user = todo.pop()
        if user in seen:
            continue
        seen.add(user)
        if isinstance(user.target, OpOverload):
            name = user.target._schema.name.partition("::")[2]
            if name in _REDUCTIONS:
                continue
            value = _value(user)
            in_order = torch.Tag.pointwise in user.target.tags or name in _IN_ORDER
            if not in_order or value is None or value.numel() > size:
                return False
        todo += [after for after in user.users if after in leads]
    return True


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
