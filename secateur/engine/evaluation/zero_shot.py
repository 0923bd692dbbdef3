"""Measure zero-shot accuracy by multiple choice.

EleutherAI's ``lm_eval`` asks the questions, scores the answers and averages the scores; this module provides the model
and the data.
"""

import copy
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx2
import torch
import yaml

from secateur.catalog.spec import ZERO_SHOT
from secateur.contract.errors import ErrorCode, PruningError
from secateur.contract.report import TaskScore
from secateur.engine.dynamic.runtime import Runtime
from secateur.engine.model.decoder import Decoder
from secateur.engine.time_limit import with_tokenizer
from secateur.extras import require

BATCH = {"cuda": 16}
BATCH_ELSEWHERE = 4
"""Examples of one forward pass on devices that ``BATCH`` does not name.

The logits of the examples take most memory.
"""
FIELD = "evaluation.zero_shot"
CHOICES = {
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "query",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
"""Configuration of an ``lm_eval`` task for rows ``{query, choices, gold}``, as LLM Foundry's local data has them."""
CONTEXTS = CHOICES | {
    "doc_to_text": "{{gold}}",
    "doc_to_choice": "context_options",
    "doc_to_target": "{{continuation}}",
    "metric_list": [{"metric": "acc"}],
}
"""Configuration of an ``lm_eval`` task for rows ``{context_options, continuation, gold}``.

The question is which context makes the continuation more likely, as in WinoGrande.
"""


def zero_shot(
    decoder: Decoder, names: Sequence[str], tasks_dir: Path | None, limit: int | None, progress: Callable[[float], None]
) -> dict[str, TaskScore]:
    """Return the score of each task.

    A score has the ``metric`` (``acc_norm`` where the task has it, else ``acc``), its ``value`` and ``stderr``, the
    number of ``examples``, and their ``source``.

    A task is one of :data:`ZERO_SHOT`, on its data set from the Hub (or the Hub's local cache), or on ``NAME.jsonl`` of
    ``tasks_dir`` in the columns of that data set. Any other ``NAME.jsonl`` of ``tasks_dir`` is a task, too, if its rows
    have the columns of :data:`CHOICES` or :data:`CONTEXTS`. With ``limit``, only the first examples of each task are
    asked.

    Raises:
        PruningError: ``task_not_found`` for an unknown name, ``task_invalid`` for data that cannot be read,
            ``hub_unavailable`` (retryable) when data cannot be fetched, ``dependency_missing`` without ``lm_eval``.
    """
    require("eval", "Zero-shot evaluation", "lm_eval", field=FIELD)
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    class Bounded(HFLM):
        """A model whose tokenizer has a bounded time for each text."""

        def tok_encode(self, string: str, *arguments: Any, **options: Any) -> list[int]:
            tokens: list[int] = with_tokenizer(
                len(string), lambda: HFLM.tok_encode(self, string, *arguments, **options)
            )
            return tokens

    class Watched(Bounded):
        """A model that reports how many questions are done; some questions need no forward pass of their own."""

        questions, done = 1, 0

        def _loglikelihood_tokens(self, requests: list[Any], *arguments: Any, **options: Any) -> Any:
            self.questions, self.done = len(requests), 0
            return super()._loglikelihood_tokens(requests, *arguments, **options)

        def _model_call(self, inps: Any, *arguments: Any, **options: Any) -> Any:
            logits = super()._model_call(inps, *arguments, **options)
            self.done += len(inps)
            progress(self.done / self.questions)
            return logits

    class Written(Bounded):
        """A dynamic model, whose answers are scored with the units that their context needs.

        All units of the model read the context.
        """

        def _loglikelihood_tokens(self, requests: list[Any], *_: Any, **__: Any) -> list[tuple[float, bool]]:
            found = []
            assert isinstance(decoder, Runtime)
            for done, (_, context, answer) in enumerate(requests, start=1):
                tokens = torch.tensor([[*context, *answer][-self.max_length :]], device=decoder.device)
                read = tokens.shape[1] - len(answer)
                logits = decoder.logits(tokens, read)[0, read - 1 : -1].float().log_softmax(-1)
                expected = tokens[0, read:]
                chosen = logits.gather(1, expected[:, None])
                found.append((float(chosen.double().sum()), bool((logits.argmax(-1) == expected).all())))
                progress(done / len(requests))
            return found

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # lm_eval's progress bars are hidden, because ``progress`` reports.
    with TemporaryDirectory() as folder, redirect_stderr(StringIO()):
        files = [_task_file(name, tasks_dir, Path(folder)) for name in names]
        manager = TaskManager(include_defaults=False)  # loading lm_eval's own tasks takes seconds
        try:
            tasks = manager.load([str(file) for file in files])["tasks"]
        except (httpx2.HTTPError, ConnectionError) as error:
            raise PruningError(
                ErrorCode.HUB_UNAVAILABLE,
                f"The data of {', '.join(names)} could not be fetched: {type(error).__name__}.",
            ) from error
        except Exception as error:  # a data set's rows or its reader may raise anything
            raise PruningError(ErrorCode.TASK_INVALID, f"{', '.join(names)}: {error}", field=FIELD) from error
        model = (Written if isinstance(decoder, Runtime) else Watched)(
            pretrained=decoder.model,
            tokenizer=copy.deepcopy(decoder.tokenizer),  # lm_eval adds a padding token
            batch_size=BATCH.get(decoder.device.type, BATCH_ELSEWHERE),
            max_length=decoder.shape.max_positions,
        )
        found = lm_eval.simple_evaluate(
            model, tasks=list(tasks.values()), task_manager=manager, limit=limit, log_samples=False
        )
        progress(1.0)
    assert found is not None, "of one process"
    return {name: _figures(found, name, tasks_dir) for name in names}


def local_tasks(tasks_dir: Path | None) -> list[str]:
    """Return the names of the tasks in ``tasks_dir``."""
    return sorted(file.stem for file in tasks_dir.glob("*.jsonl")) if tasks_dir is not None else []


def task_config(name: str, file: Path | None, cache: Path) -> dict[str, Any]:
    """Return the ``lm_eval`` configuration that scores task ``name``, on ``file`` where there is one.

    Raises:
        PruningError: ``task_invalid`` when ``file`` has no JSON objects or other columns than those allowed.
    """
    import lm_eval

    own = {"include": str(Path(lm_eval.__file__).parent / "tasks" / ZERO_SHOT[name])} if name in ZERO_SHOT else {}
    if file is None:
        return {**own, "task": name}
    columns = _columns(file)
    data: dict[str, Any] = {"dataset_kwargs": {"data_files": {"test": str(file)}, "cache_dir": str(cache)}}
    for config in (CHOICES, CONTEXTS):
        if {str(config["doc_to_choice"]), "gold"} <= columns:
            return {"task": name, **config, **data}
    if not own:
        raise PruningError(
            ErrorCode.TASK_INVALID,
            f"{file.name}: rows have {', '.join(sorted(columns))}; allowed: query, choices, gold, or context_options, "
            "continuation, gold.",
            field=FIELD,
        )
    splits = {"training_split": None, "validation_split": None, "test_split": "test"}
    return {**own, "task": name, "dataset_path": "json", "dataset_name": None, **splits, **data}


def _task_file(name: str, tasks_dir: Path | None, folder: Path) -> Path:
    file = None if tasks_dir is None else tasks_dir / f"{name}.jsonl"
    if file is None or not file.is_file():
        file = None
        if name not in ZERO_SHOT:
            known = ", ".join([*ZERO_SHOT, *local_tasks(tasks_dir)])
            raise PruningError(ErrorCode.TASK_NOT_FOUND, f"There is no task '{name}'; allowed: {known}.", field=FIELD)
    written = folder / f"{name}.yaml"
    written.write_text(yaml.safe_dump(task_config(name, file, folder)))
    return written


def _columns(file: Path) -> set[str]:
    try:
        with file.open(encoding="utf-8") as lines:
            row = json.loads(next(lines))
        return set(row.keys())
    except (StopIteration, ValueError, AttributeError):
        raise PruningError(
            ErrorCode.TASK_INVALID, f"{file.name} is no file of JSON objects, one a line.", field=FIELD
        ) from None


def _figures(found: dict[str, Any], name: str, tasks_dir: Path | None) -> TaskScore:
    result = found["results"][name]
    metric = "acc_norm" if "acc_norm,none" in result else "acc"
    local = name in local_tasks(tasks_dir)
    error = result[f"{metric}_stderr,none"]
    return TaskScore(
        metric=metric,
        value=result[f"{metric},none"],
        stderr=float(error) if isinstance(error, int | float) else None,  # lm_eval writes "N/A" for one example
        examples=found["n-samples"][name]["effective"],
        source=f"{name}.jsonl" if local else found["configs"][name]["dataset_path"],
    )
