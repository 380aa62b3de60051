"""Train in a process of its own, which is killed meanwhile."""

import multiprocessing
import os
import signal

import torch


def killed_in(train, *args):
    """Run `train(*args)` in another process, which must end by `die`."""
    process = multiprocessing.get_context("spawn").Process(target=_alone, args=(train, args))
    process.start()
    try:
        process.join(120)
        assert process.exitcode == -signal.SIGKILL
    finally:
        process.kill()
        process.join()


def _alone(train, args):
    torch.set_num_threads(1)
    train(*args)


def die():
    """End this process with no chance to clean up."""
    os.kill(os.getpid(), signal.SIGKILL)
