"""Zero-shot accuracy by multiple choice: EleutherAI's ``lm_eval`` asks, scores and averages; here it only gets model and data."""

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
from secateur.extras import require

BATCH = {"cuda": 16}
BATCH_ELSEWHERE = 4
"""Examples of one forward pass: their logits are what takes memory."""
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
"""``lm_eval``'s task for rows ``{query, choices, gold}``, as LLM Foundry's local data has them."""
CONTEXTS = CHOICES | {
    "doc_to_text": "{{gold}}",
    "doc_to_choice": "context_options",
    "doc_to_target": "{{continuation}}",
    "metric_list": [{"metric": "acc"}],
}
"""For rows ``{context_options, continuation, gold}``: which context makes the continuation likelier, as in WinoGrande."""


def zero_shot(
    decoder: Decoder, names: Sequence[str], tasks_dir: Path | None, limit: int | None, progress: Callable[[float], None]
) -> dict[str, TaskScore]:
    """For each task its ``metric`` (``acc_norm`` where it has that, else ``acc``), that ``value`` and its ``stderr``, how many
    ``examples`` were asked, and where they come from (``source``).

    A task is one of :data:`ZERO_SHOT`, on its data set from the Hub (or its local cache), or on ``NAME.jsonl`` of
    ``tasks_dir`` in that data set's columns; or any ``NAME.jsonl`` there whose rows are of :data:`CHOICES` or
    :data:`CONTEXTS`. ``limit`` takes the first examples of each.

    Raises:
        PruningError: ``task_not_found``, ``task_invalid``, ``hub_unavailable`` (retryable), ``dependency_missing``.
    """
    require("eval", "Zero-shot evaluation", "lm_eval", field=FIELD)
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    class Watched(HFLM):
        """Tells how many of the questions are asked; some need no pass of their own."""

        questions, done = 1, 0

        def _loglikelihood_tokens(self, requests: list[Any], *arguments: Any, **options: Any) -> Any:
            self.questions, self.done = len(requests), 0
            return super()._loglikelihood_tokens(requests, *arguments, **options)

        def _model_call(self, inps: Any, *arguments: Any, **options: Any) -> Any:
            logits = super()._model_call(inps, *arguments, **options)
            self.done += len(inps)
            progress(self.done / self.questions)
            return logits

    class Written(HFLM):
        """Of a model that prunes itself the context is read by all of it, the answer written by what that needs."""

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
    with TemporaryDirectory() as folder, redirect_stderr(StringIO()):  # its bars: ours are told by ``progress``
        files = [_task_file(name, tasks_dir, Path(folder)) for name in names]
        manager = TaskManager(include_defaults=False)  # to know all of the library's takes it seconds
        try:
            tasks = manager.load([str(file) for file in files])["tasks"]
        except (httpx2.HTTPError, ConnectionError) as error:
            raise PruningError(
                ErrorCode.HUB_UNAVAILABLE,
                f"The data of {', '.join(names)} could not be fetched: {type(error).__name__}.",
            ) from error
        except Exception as error:  # whatever a data set's rows or its reader may raise
            raise PruningError(ErrorCode.TASK_INVALID, f"{', '.join(names)}: {error}", field=FIELD) from error
        model = (Written if isinstance(decoder, Runtime) else Watched)(
            pretrained=decoder.model,
            tokenizer=copy.deepcopy(decoder.tokenizer),  # it is given a padding token
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
    """The names of the tasks in the folder."""
    return sorted(file.stem for file in tasks_dir.glob("*.jsonl")) if tasks_dir is not None else []


def task_config(name: str, file: Path | None, cache: Path) -> dict[str, Any]:
    """The configuration of ``lm_eval``'s that scores task ``name``, on ``file`` where there is one.

    Raises:
        PruningError: ``task_invalid``.
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
