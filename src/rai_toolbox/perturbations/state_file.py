"""The file that keeps what has been evaluated, so that a run that was stopped can go on."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rai_toolbox.perturbations.report import RobustnessReport

__all__ = ["StateFile", "StateFileError", "write_whole"]

FORMAT = "rai_toolbox evaluation 1"


class StateFileError(ValueError):
    """A state file that is not one, or that of another run; nothing has been changed."""


class StateFile:
    """What a run has found so far: plain JSON, replaced as a whole after each batch.

    Parameters
    ----------
    path : Path, optional
        None: nothing is kept on disk.
    model : str
        The fingerprint of the model.
    start : RobustnessReport
        The report of no data, with the settings of the run.

    Raises
    ------
    StateFileError
        If there is a file that is not of this model and these settings.
    """

    def __init__(self, path: Path | None, model: str, start: RobustnessReport) -> None:
        self.path, self.model = path, model
        self.report, self.batches = start, list[str]()
        self.read, self._kept = 0, True
        if path is not None and path.exists():
            self._load(path, start)

    def knows(self, batch: str) -> bool:
        """Whether the next batch is in the report; raise if another one is there in its place."""
        index = self.read
        self.read += 1
        if index >= len(self.batches):
            return False
        if self.batches[index] != batch:
            raise StateFileError(
                f"batch {index} of `loader` must be the one that {self.path} was written for "
                "(same data, order and batch size; no shuffling), got another one"
            )
        return True

    def add(self, batches: Sequence[str], parts: Sequence[RobustnessReport]) -> None:
        """Take up what was found for some more batches."""
        self.report = RobustnessReport.merged([self.report, *parts])
        self.batches.extend(batches)
        self._kept = False

    def save(self) -> None:
        """Keep on disk what has been found, if that is more than there is."""
        if self.path is not None and not self._kept:
            plain = {"format": FORMAT, "model": self.model, "report": self.report.to_plain()}
            write_whole(self.path, json.dumps(plain | {"batches": self.batches}))
            self._kept = True

    def finish(self) -> RobustnessReport:
        """The report; raise if `loader` had fewer batches than the file."""
        if self.read < len(self.batches):
            raise StateFileError(
                f"`loader` must have the {len(self.batches)} batches that {self.path} was written "
                f"for, got {self.read}"
            )
        return self.report

    def _load(self, path: Path, start: RobustnessReport) -> None:
        try:
            plain = json.loads(path.read_text(encoding="utf-8"))
            if plain["format"] != FORMAT:
                raise ValueError(plain["format"])
            report = RobustnessReport.from_plain(plain["report"])
            model, batches = str(plain["model"]), [str(batch) for batch in plain["batches"]]
        except (ValueError, KeyError, TypeError) as error:
            raise StateFileError(
                f"`state_file` must be of this format ({FORMAT!r}) or not exist yet, got {path}"
            ) from error
        other = _differences(
            {**report.settings, "epsilons": dict(report.epsilons)},
            {**start.settings, "epsilons": dict(start.epsilons)},
        )
        if model != self.model:
            other.append("another model or other weights")
        if other:
            raise StateFileError(
                f"`state_file` must be of the same run, got {path}, made with {'; '.join(other)}"
            )
        self.report, self.batches = report, batches


def _differences(kept: Any, asked: Any, of: str = "") -> list[str]:
    """Where two settings differ, in words."""
    if kept == asked:
        return []
    if isinstance(kept, dict) and isinstance(asked, dict):
        names = sorted({*kept, *asked})
        pairs = ((kept.get(n), asked.get(n), f"{of}.{n}" if of else n) for n in names)
        return [line for one, two, name in pairs for line in _differences(one, two, name)]
    return [f"{of} = {kept!r} instead of {asked!r}"]


def write_whole(path: Path, text: str) -> None:
    """Write a file such that at any moment, whatever happens, it is the old or the new one."""
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
