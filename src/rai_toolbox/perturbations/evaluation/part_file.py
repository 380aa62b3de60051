"""The file of the batch that is being attacked, from which a stopped run resumes within it."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from rai_toolbox.extras import Bar
from rai_toolbox.perturbations.journal import Journal


class PartFile:
    """What the balls of one batch have given so far, by their fingerprints.

    The file is replaced as a whole after each attack, and removed when its batch is in the state
    file. One of another run or batch is ignored.

    Parameters
    ----------
    path : Path, optional
        None keeps nothing.
    run : str
        The fingerprint of model and settings.
    """

    def __init__(self, path: Path | None, run: str) -> None:
        self.path, self.run, self.batch = path, run, ""
        self.found: dict[str, dict[str, Any]] = {}

    def open(self, batch: str) -> None:
        """Go on with a batch: read what an earlier run has found."""
        self.batch, self.found = batch, {}
        if self.path is None or not self.path.exists():
            return
        try:
            held = torch.load(self.path, map_location="cpu", weights_only=True)
            if (held["run"], held["batch"]) == (self.run, batch):
                self.found = held["found"]
        except (RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError):
            pass  # not ours: it costs the attacks on one batch

    def keep(self, ball: str, found: dict[str, Any]) -> None:
        """Write what was found in a ball."""
        if self.path is None:
            return
        self.found[ball] = _on_cpu(found)
        temporary = self.path.with_name(self.path.name + ".tmp")
        torch.save({"run": self.run, "batch": self.batch, "found": self.found}, temporary)
        os.replace(temporary, self.path)

    def remove(self) -> None:
        """Remove the file, as the state file has the batch; if there was one."""
        if self.path is not None and self.batch:
            self.path.unlink(missing_ok=True)


class BallJournal(Journal):
    """The journal of the attacks in one ball of a batch: on the progress bar, and in the file."""

    def __init__(
        self, part: PartFile, ball: str, bar: Bar, title: str, device: torch.device, seed: int
    ) -> None:
        self.part, self.ball, self.bar, self.title, self.device = part, ball, bar, title, device
        self.generator = Generator().manual_seed(seed)

    def finished(self) -> dict[str, Any] | None:
        """What the solver has returned, if it was not stopped."""
        found = self.part.found.get(self.ball, {})
        return found if "data" in found else None

    def earlier(self) -> dict[str, Any]:
        """What was kept last; the random numbers are set back to what they were then."""
        found = self.part.found.get(self.ball)
        if found is None:
            return {}
        self.generator.set_state(found["generator"])
        torch.set_rng_state(found["torch"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(found["cuda"], self.device)
        return {name: _moved(value, self.device) for name, value in found["state"].items()}

    def begin(self, attack: str, left: int) -> None:
        """Show the attack on the bar."""
        # (in a log file each text would be a new line)
        self.bar.set_postfix_str(f"{self.title}, {attack}: {left} left", sys.stderr.isatty())

    def keep(self, state: dict[str, Any]) -> None:
        """Write the state, and that of all random numbers, to the file."""
        rng = {"generator": self.generator.get_state(), "torch": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        self.part.keep(self.ball, {"state": dict(state), **rng})


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _on_cpu(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _on_cpu(item) for name, item in value.items()}
    return value.detach().cpu() if isinstance(value, Tensor) else value
