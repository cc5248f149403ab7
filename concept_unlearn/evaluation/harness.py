"""Any task of EleutherAI's lm-evaluation-harness, put to a model with and without a patch.

``python -m concept_unlearn.evaluation.harness`` is lm-eval's own command, which then knows ``--model concept_unlearn
--model_args pretrained=...,patch=...``: lm-eval finds no models of other packages by itself.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import json
import math
import random
import statistics
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import Field

from ..component import Frozen
from ..errors import InvalidConfig, InvalidData, MissingExtra
from ..lm import LM
from ..patches import Patch

MODEL = "concept_unlearn"
"""The name of the model type in lm-eval's registry."""
Results = dict[str, Any]
"""As lm-eval returns and writes them."""
_NOT_METRICS = ("name", "alias", "sample_len", "sample_count")


class Harness(Frozen):
    """``harness(lm, patch)`` -> lm-eval's results: tasks, and how they are asked, the same for every model."""

    tasks: tuple[str, ...] = Field(min_length=1)
    """Names of tasks, groups and tags, also with * in them, or .yaml files."""
    include_path: Path | None = None
    """A folder with tasks of your own."""
    limit: float | None = Field(None, gt=0)
    """So many documents of each task, or below 1 that share of them: for trying things out."""
    num_fewshot: int | None = Field(None, ge=0)
    """Examples before each question; the task's own number where None."""
    batch_size: int | Literal["auto"] = 8
    apply_chat_template: bool = False

    @cached_property
    def manager(self) -> Any:
        """Reads lm-eval's own 14,000 tasks, which takes seconds, only where some are asked for."""
        _require()
        from lm_eval.tasks import TaskManager

        if self.include_path is not None and not self.include_path.is_dir():
            raise InvalidConfig(f"no folder of tasks {self.include_path}")
        own = TaskManager(include_path=self.include_path, include_defaults=False)
        if all(name in own.all_subtasks or Path(name).is_file() for name in self.tasks):
            return own
        return TaskManager(include_path=self.include_path)

    @cached_property
    def names(self) -> list[str]:
        """Of all that is asked for. Raises InvalidConfig for a task that there is not."""
        found: dict[str, None] = {}
        for task in self.tasks:
            matches = [task] if Path(task).is_file() else self.manager.match_tasks([task])
            if not matches:
                close = difflib.get_close_matches(task, self.manager.all_tasks, n=3)
                guess = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
                raise InvalidConfig(f"lm-eval has no task {task!r}: `lm_eval ls tasks` lists what it has.{guess}")
            found |= dict.fromkeys(matches)
        return list(found)

    def __call__(
        self, lm: LM, patch: Patch | None = None, *, folder: Path | None = None, about: Mapping[str, Any] | None = None
    ) -> Results | None:
        """With a ``folder`` also written there, in lm-eval's own files; ``about`` is added to what they say of the
        model. None in all but the first of several processes.
        """
        _require()
        from lm_eval import simple_evaluate
        from lm_eval.loggers import EvaluationTracker

        from .harness_model import PatchedHFLM

        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        tracker = EvaluationTracker(output_path=None if folder is None else str(folder))
        model = PatchedHFLM(lm, patch, batch_size=self.batch_size)
        names, manager = self.names, self.manager
        with _randomness_kept(lm.device), _data_within_reach():
            results: Results | None = simple_evaluate(
                model=model, model_args={"pretrained": lm.name} | dict(about or {}), tasks=names, task_manager=manager,
                limit=self.limit, num_fewshot=self.num_fewshot, batch_size=self.batch_size,
                apply_chat_template=self.apply_chat_template, fewshot_as_multiturn=self.apply_chat_template,
                evaluation_tracker=tracker,
            )  # fmt: skip
        if results is not None and folder is not None:
            _write(results, tracker, folder)
        return results


class Change(NamedTuple):
    """One metric of one task, before and after."""

    task: str
    metric: str
    """With its filter behind a comma, where it has one."""
    before: float
    before_stderr: float | None
    after: float
    after_stderr: float | None
    difference: float
    stderr: float | None
    """Of the difference, document by document; None where the metric is no mean over documents."""


def changes(before: Results, after: Results) -> list[Change]:
    """Every number that both results have, in their order."""
    found = []
    for task, metrics in before["results"].items():
        for key, value in metrics.items():
            name, _, how = key.partition(",")
            other = after["results"].get(task, {}).get(key)
            if name in _NOT_METRICS or name.endswith("_stderr") or not (_is_number(value) and _is_number(other)):
                continue
            old, new = (_number(r["results"][task].get(f"{name}_stderr,{how}")) for r in (before, after))
            difference, called = other - value, name if how == "none" else key
            stderr = _stderr(difference, _paired(before, after, task, name, how))
            found.append(Change(task, called, float(value), old, float(other), new, float(difference), stderr))
    return found


def main() -> None:
    """lm-eval's own command with one more type of model."""
    register()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


def register() -> None:
    """Make the model type known to lm-eval in this process."""
    _require()
    import lm_eval.models  # noqa: F401 (its own types, which it would not look for once there is another)
    from lm_eval.api.registry import model_registry

    if MODEL not in model_registry:
        model_registry.register(MODEL, target=f"{__package__}.harness_model:PatchedHFLM")


def _require() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingExtra("lm_eval", "to run its tasks")


def _write(results: Results, tracker: Any, folder: Path) -> None:
    samples = results["samples"]
    tracker.save_results_aggregated({k: v for k, v in results.items() if k != "samples"}, samples=samples)
    for task, rows in samples.items():
        tracker.save_results_samples(task, [dict(row) for row in rows])
    try:  # lm-eval logs what goes wrong and goes on
        json.loads(next(folder.rglob(f"results_{getattr(tracker, 'date_id', '-')}.json")).read_text())
    except (StopIteration, json.JSONDecodeError):
        raise OSError(f"lm-eval could not write its results to {folder}") from None


@contextlib.contextmanager
def _randomness_kept(device: torch.device) -> Iterator[None]:
    """lm-eval seeds every generator that there is."""
    state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(state)
            np.random.set_state(numpy_state)


@contextlib.contextmanager
def _data_within_reach() -> Iterator[None]:
    from datasets.exceptions import DatasetNotFoundError

    try:
        yield
    except (ConnectionError, DatasetNotFoundError) as error:
        raise InvalidData(f"the data of a task cannot be had: {error}") from error


def _paired(before: Results, after: Results, task: str, metric: str, how: str) -> list[float]:
    """After minus before for each document of a task, or of all tasks of a group; empty where there are no numbers."""
    names = before.get("group_subtasks", {}).get(task) or [task]
    found: list[float] = []
    for name in names:
        if name not in before["samples"]:
            found += _paired(before, after, name, metric, how) if name != task else []
            continue
        rows = [
            {s["doc_id"]: s.get(metric) for s in results["samples"][name] if s["filter"] == how}
            for results in (before, after)
        ]
        if any(not _is_number(row.get(i)) for row in rows for i in rows[0]):
            return []
        found += [float(rows[1][i]) - float(rows[0][i]) for i in rows[0]]
    return found


def _stderr(difference: float, paired: list[float]) -> float | None:
    if len(paired) < 2 or not math.isclose(statistics.fmean(paired), difference, rel_tol=1e-6, abs_tol=1e-9):
        return None
    return statistics.stdev(paired) / math.sqrt(len(paired))


def _is_number(value: Any) -> bool:
    return isinstance(value, (bool, int, float, np.number)) and math.isfinite(float(value))


def _number(value: Any) -> float | None:
    return float(value) if _is_number(value) else None


if __name__ == "__main__":
    main()
