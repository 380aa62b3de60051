"""Run a function on k ranks: processes of this machine that talk by gloo over 127.0.0.1."""

from __future__ import annotations

import io
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

# Ranks are forked from a process that has imported all of this once.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["torch", "torch.distributed.tensor", "torch.distributed.fsdp", "rai_toolbox.optim"]
)


class Outcome(NamedTuple):
    """How a rank ended: with a value, with the text of an error, or (neither) killed."""

    value: Any
    error: str | None
    exit_code: int | None


def on_ranks(k: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
    """What `function(*args)` returns on each of k ranks; RuntimeError if it fails on one."""
    found = outcomes(k, function, *args, timeout=timeout)
    wrong = {rank: o.error or o for rank, o in enumerate(found) if o.error or o.exit_code != 0}
    if wrong:
        told = "\n".join(f"rank {rank}: {error}" for rank, error in wrong.items())
        raise RuntimeError(f"{len(wrong)} of {k} ranks failed\n{told}")
    return [o.value for o in found]


def outcomes(
    k: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0
) -> list[Outcome]:
    """How each of k ranks ends, all within `timeout` seconds: who has not by then is killed."""
    # The port is taken by the store itself, so that nobody else can come between.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes = [_CONTEXT.Pipe(duplex=False) for _ in range(k)]
    processes = [
        _CONTEXT.Process(target=_run, args=(rank, k, store.port, timeout, send, function, args))
        for rank, (_, send) in enumerate(pipes)
    ]
    end = time.monotonic() + timeout
    try:
        for process, (_, send) in zip(processes, pipes, strict=True):
            process.start()
            send.close()  # here: so that the pipe ends with its rank
        told = _told([receive for receive, _ in pipes], end)
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    return [Outcome(*t, p.exitcode) for t, p in zip(told, processes, strict=True)]


def _told(pipes: list[Connection], end: float) -> list[tuple[Any, str | None]]:
    told: dict[Any, tuple[Any, str | None]] = {}
    while len(told) < len(pipes) and time.monotonic() < end:
        for pipe in wait([p for p in pipes if p not in told], end - time.monotonic()):
            try:
                told[pipe] = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
            except EOFError:
                told[pipe] = (None, None)
    return [told.get(pipe, (None, None)) for pipe in pipes]


def _run(
    rank: int,
    k: int,
    port: int,
    timeout: float,
    send: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    limit = timedelta(seconds=timeout)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=k, timeout=limit)
    try:
        _send(send, function(*args), None)
        dist.barrier()
        dist.destroy_process_group()
    except Exception:
        _send(send, None, traceback.format_exc())
        os._exit(1)  # as a crash would: the others are not told


def _send(pipe: Connection, value: Any, error: str | None) -> None:
    # Not by `send`, which shares the memory of tensors: it goes with its rank.
    buffer = io.BytesIO()
    torch.save((value, error), buffer)
    pipe.send_bytes(buffer.getvalue())
