"""The state file of an evaluation, from which a stopped run resumes."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rai_toolbox.checks import wrong
from rai_toolbox.perturbations.evaluation.report import RobustnessReport

FORMAT = "rai_toolbox evaluation 2"


class StateFileError(ValueError):
    """A state file of another format or another run. It has not been changed."""


class StateFile:
    """The results of a run so far: plain JSON, replaced as a whole after each round of batches.

    Parameters
    ----------
    path : Path, optional
        None keeps nothing on disk.
    model : str
        The fingerprint of the model.
    start : RobustnessReport
        The report of no data, with the settings of the run.

    Raises
    ------
    StateFileError
        If the file is not of this model and these settings.
    ValueError
        If there is no such folder.
    """

    def __init__(self, path: Path | None, model: str, start: RobustnessReport) -> None:
        self.path, self.model = path, model
        self.report, self.batches = start, list[str]()
        if path is None:
            return
        if not path.parent.is_dir():
            raise wrong("state_file", "be in a folder that exists", str(path))
        if path.exists():
            self._load(path, start)

    def holds(self, index: int, batch: str) -> bool:
        """Whether the report holds this batch of the loader; raise if it holds another one."""
        if index >= len(self.batches):
            return False
        if self.batches[index] != batch:
            raise StateFileError(
                f"batch {index} of `loader` must be the one that {self.path} was written for "
                "(same data, order and batch size; no shuffling), got another one"
            )
        return True

    def add(self, batches: Sequence[str], parts: Sequence[RobustnessReport]) -> None:
        """Add the reports of more batches."""
        self.report = RobustnessReport.merged([self.report, *parts])
        self.batches.extend(batches)

    def save(self) -> None:
        """Write the file, if there are results."""
        if self.path is not None and self.batches:
            plain = {"format": FORMAT, "model": self.model, "report": self.report.to_plain()}
            write_whole(self.path, json.dumps(plain | {"batches": self.batches}))

    def check_number(self, number: int) -> None:
        """Raise if `loader` had no batch, or fewer batches than the file."""
        if number < len(self.batches):
            rule = f"have the {len(self.batches)} batches that {self.path} was written for"
            raise wrong("loader", rule, number, StateFileError)
        if number == 0:
            raise wrong("loader", "give one batch at least", "none")

    def _load(self, path: Path, start: RobustnessReport) -> None:
        try:
            plain = json.loads(path.read_text(encoding="utf-8"))
            if plain["format"] != FORMAT:
                raise ValueError(plain["format"])
            report = RobustnessReport.from_plain(plain["report"])
            model, batches = str(plain["model"]), [str(batch) for batch in plain["batches"]]
        except (ValueError, KeyError, TypeError) as error:
            rule = f"be of this format ({FORMAT!r}) or not exist yet"
            raise wrong("state_file", rule, str(path), StateFileError) from error
        found, asked = ({**r.settings, "epsilons": dict(r.epsilons)} for r in (report, start))
        other = _differences(found, asked)
        if model != self.model:
            other.append("another model or other weights")
        if other:
            got = f"{path}, made with {'; '.join(other)}"
            raise wrong("state_file", "be of the same run", got, StateFileError)
        self.report, self.batches = report, batches


def _differences(found: Any, asked: Any, of: str = "") -> list[str]:
    """Descriptions of where two settings differ."""
    if isinstance(found, dict) and isinstance(asked, dict):
        names = sorted({*found, *asked})
        pairs = ((found.get(n), asked.get(n), f"{of}.{n}" if of else n) for n in names)
        return [line for one, two, name in pairs for line in _differences(one, two, name)]
    return [] if found == asked else [f"{of} = {found!r} instead of {asked!r}"]


def write_whole(path: Path, text: str) -> None:
    """Replace a file as a whole: at any moment it is the old or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
