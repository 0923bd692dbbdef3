"""The error codes of the project, and the exception that carries an error code.

Each code has a meaning, advice, and a flag that says whether the same request may succeed later.
``docs/errors.md`` is made from the enumeration :class:`ErrorCode`.
"""

from enum import StrEnum
from typing import Any, Self


class ErrorCode(StrEnum):
    """A stable name for one kind of error.

    Jobs, problem documents (RFC 9457), the library and the command line use the same codes.
    """

    meaning: str
    """The cause of the error, in one sentence."""
    advice: str
    """The action that resolves the error, in one sentence."""
    retryable: bool
    """Whether the same request may succeed later without a change."""

    def __new__(cls, code: str, meaning: str, advice: str, retryable: bool = False) -> Self:
        member = str.__new__(cls, code)
        member._value_ = code
        member.meaning, member.advice, member.retryable = meaning, advice, retryable
        return member

    # fmt: off
    # The model
    MODEL_ID_INVALID = "model_id_invalid", "The model id is neither a Hub id nor the name of a local model.", "Write 'org/name', 'local:NAME', or, in the library and on the command line, the path of a folder or GGUF file."
    MODEL_NOT_FOUND = "model_not_found", "The model, or the named file of it, does not exist or the token may not read it.", "Check the name; give a token that may read the model."
    MODEL_GATED = "model_gated", "The model is gated on the Hub.", "Accept the model's terms with the account of the token that is used."
    MODEL_TOO_LARGE = "model_too_large", "The model has more parameters than this service accepts.", "Use a smaller model, or ask the operator to raise SECATEUR_MAX_MODEL_PARAMETERS."
    REVISION_NOT_FOUND = "revision_not_found", "The model has no such branch, tag or commit.", "Check the revision; a model on this machine has none."
    CONFIG_INVALID = "config_invalid", "The model's config.json cannot be read, or contradicts its weights.", "Repair the model's files."
    CONFIG_UNKNOWN = "config_unknown", "The sizes of a GGUF file on the Hub are known only after it is downloaded.", "Submit the job; the worker reads the sizes."
    WEIGHTS_MISSING = "weights_missing", "The model has no safetensors weights, or lacks a tensor or a shard.", "Convert pickled weights to safetensors; complete the files."
    WEIGHTS_CORRUPT = "weights_corrupt", "A weight file is corrupt or truncated.", "Download or copy the file again."
    WEIGHTS_QUANTIZED = "weights_quantized", "The weights are quantised, so units cannot be scored or cut.", "Use the unquantised checkpoint."
    WEIGHTS_NOT_FINITE = "weights_not_finite", "A tensor of the model holds NaN or infinity.", "Repair the checkpoint, or use another dtype."
    TOKENIZER_MISSING = "tokenizer_missing", "The model has no tokenizer that transformers can load.", "Put the tokenizer's files beside the weights."
    TOKENIZER_MISMATCH = "tokenizer_mismatch", "The tokenizer makes tokens that the model has no embeddings for.", "Use the tokenizer that belongs to the model."
    TOKENIZER_UNUSABLE = "tokenizer_unusable", "The tokenizer does not finish within its time, fails on a text, or has a file that is too large.", "Repair the tokenizer; see the message."
    STRUCTURE_UNSUPPORTED = "structure_unsupported", "No unit of a requested structure can leave the model.", "Name other structures; POST /v1/models/inspect lists those of the model."
    VOCABULARY_UNSUPPORTED = "vocabulary_unsupported", "The vocabulary of this model or tokenizer cannot be cut.", "Leave 'vocabulary' out of the structures; see the message for the reason."
    UNSUPPORTED_ARCHITECTURE = "unsupported_architecture", "This kind of model cannot be pruned.", "See the message for the reason and the documentation for the supported families."
    SOURCE_CHANGED = "source_changed", "The model or the request changed since the run that is to be resumed began.", "Start anew, without the saved state."
    STATE_INVALID = "state_invalid", "The saved state of a run cannot be read by this version.", "Start anew, without the saved state."
    # The request
    INVALID_REQUEST = "invalid_request", "A field of the request is missing, unknown or has a value that is not allowed.", "Correct the fields named in 'errors'."
    RATIO_UNREACHABLE = "ratio_unreachable", "Whole units do not come near enough to the ratio.", "Use the nearest ratio, which the message names."
    RATIO_MISSED = "ratio_missed", "The pruned model does not have the size that was planned.", "Report a defect."
    GOAL_UNREACHABLE = "goal_unreachable", "The model cannot be pruned to the requested size.", "Choose a size between those that the message names."
    METHOD_UNSUPPORTED = "method_unsupported", "The method does not support this model.", "Use one of the methods that the message names."
    RECOVERY_UNSUPPORTED = "recovery_unsupported", "The recovery does not support this model.", "Use one of the recoveries that the message names."
    GGUF_UNSUPPORTED = "gguf_unsupported", "The pruned model cannot be written as a GGUF file.", "Leave 'gguf' out of 'formats', or use the layout that the message names."
    GGUF_UNAVAILABLE = "gguf_unavailable", "The worker has no llama.cpp to check a GGUF file with.", "Install the extra: pip install 'secateur[gguf]'."
    DEPENDENCY_MISSING = "dependency_missing", "A package that the request needs is not installed.", "Install the extra that the message names."
    OUTPUT_EXISTS = "output_exists", "The output folder exists and is not empty.", "Name another folder, or empty this one."
    # Texts and tasks
    TEXT_NOT_FOUND = "text_not_found", "The text or data set does not exist.", "Use one of the names that the message lists, or a data set of the Hub."
    TEXT_INVALID = "text_invalid", "The text is not UTF-8, or the data set has no such column or cannot be read.", "Correct the text; see the message."
    CHAT_TEMPLATE_MISSING = "chat_template_missing", "The model's tokenizer has no chat template to render chats with.", "Give texts, or use a model whose tokenizer has a chat template."
    CALIBRATION_TOO_SHORT = "calibration_too_short", "The calibration text has fewer tokens than one window.", "Give more text, or a smaller 'calibration.sequence_length'."
    EVALUATION_TOO_SHORT = "evaluation_too_short", "The evaluation text has fewer tokens than one window.", "Give more text, or a smaller 'evaluation.sequence_length'."
    TASK_NOT_FOUND = "task_not_found", "There is no zero-shot task of this name.", "Use one of the names that the message lists."
    TASK_INVALID = "task_invalid", "The file of a zero-shot task cannot be used.", "Correct the file; see the message."
    # The run
    LOSS_NOT_FINITE = "loss_not_finite", "The loss or a gradient became NaN or infinite.", "Use dtype 'float32' or 'bfloat16', or a smaller learning rate."
    OUT_OF_MEMORY = "out_of_memory", "The model does not fit into the worker's memory.", "Use a smaller dtype, fewer or shorter calibration samples, or a larger worker. A job moves to a larger worker by itself if one is live."
    DISK_FULL = "disk_full", "The disk has no room for the result.", "Make room; the job may then be retried.", True
    DISK_LIMIT_EXCEEDED = "disk_limit_exceeded", "The job's files take more space than SECATEUR_MAX_JOB_DISK_BYTES allows.", "Use a smaller model or a larger target ratio, or ask the operator to raise the limit."
    EXPORT_INVALID = "export_invalid", "The written checkpoint does not compute what the pruned model computes.", "Report a defect; nothing was published."
    CHECKPOINT_DAMAGED = "checkpoint_damaged", "A file that a run is to be resumed from is missing or damaged.", "Start anew."
    INTERNAL_ERROR = "internal_error", "The pruning process failed in a way that was not foreseen.", "See the worker's log; retry, and report a defect if it happens again.", True
    RUNNER_DIED = "runner_died", "The worker's process was killed or crashed.", "The job is retried, unless the process crashed twice at the same place; see the worker's log.", True
    RUNNER_STALLED = "runner_stalled", "The worker's process reported nothing for SECATEUR_STALL_TIMEOUT seconds.", "The job is retried, unless the process hung twice at the same place; see the worker's log.", True
    WORKER_LOST = "worker_lost", "The worker that ran the job stopped answering.", "The job is retried; see whether the worker's machine is well.", True
    MAX_RUNTIME_EXCEEDED = "max_runtime_exceeded", "The job ran longer than its limit.", "Raise 'max_runtime_seconds', or ask for less."
    # The Hub
    HUB_UNAVAILABLE = "hub_unavailable", "The Hub could not be reached or does not answer as it should.", "Try again later.", True
    HUB_BUSY = "hub_busy", "The service is asking the Hub as much at once as it may.", "Wait as long as 'Retry-After' says.", True
    HUB_FORBIDDEN = "hub_forbidden", "There is no Hub token, or the token may not write to the repository.", "Give a token that may write there, or another repository."
    NAMESPACE_FORBIDDEN = "namespace_forbidden", "The API key may not publish to this namespace with what the service lends it.", "Publish to the namespace that the message names, bring a Hub token, or ask the operator: 'secateur keys set'."
    REPOSITORY_TAKEN = "repository_taken", "A job of another API key made the repository.", "Choose another name for the repository."
    HUB_REFUSED = "hub_refused", "The Hub refused the repository or the commit.", "See the Hub's message."
    HUB_CONFLICT = "hub_conflict", "Others keep committing to the repository.", "Try again later.", True
    HUB_TOKENS_DISABLED = "hub_tokens_disabled", "This service does not keep Hub tokens.", "Ask the operator to set SECATEUR_SECRET_KEYS."
    HUB_TOKEN_UNREADABLE = "hub_token_unreadable", "A kept Hub token cannot be decrypted.", "Set the token again; keep old keys in SECATEUR_SECRET_KEYS while tokens need them."
    # The service
    UNAUTHORIZED = "unauthorized", "There is no valid API key in the request.", "Send 'Authorization: Bearer KEY'."
    INSUFFICIENT_SCOPE = "insufficient_scope", "The API key lacks the scope that this operation needs.", "Use a key with the scope that the message names."
    NOT_FOUND = "not_found", "There is no such resource, or it belongs to another key.", "Check the path."
    METHOD_NOT_ALLOWED = "method_not_allowed", "The path does not support this HTTP method.", "See the 'Allow' header."
    MALFORMED_REQUEST = "malformed_request", "The request cannot be read.", "Send a valid HTTP request with a JSON body."
    BODY_TOO_LARGE = "body_too_large", "The request's body is larger than this service accepts.", "Upload long texts as a data set (POST /v1/datasets), and name it 'upload:ID'."
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type", "The request's body is not declared as a type that the operation reads, or is compressed.", "Send the 'Content-Type' that the message names, and no 'Content-Encoding'."
    HTTP_ERROR = "http_error", "The server answered with an HTTP error that has no code of its own.", "See the status."
    RANGE_MALFORMED = "range_malformed", "The 'Range' header cannot be read.", "Write it as 'bytes=0-99'."
    RANGE_NOT_SATISFIABLE = "range_not_satisfiable", "The file has no such range.", "See the 'Content-Range' header for the file's size."
    WRONG_STATE = "wrong_state", "The job's state does not allow the operation.", "See 'state'."
    DATASET_IN_USE = "dataset_in_use", "A job that has not ended names the data set.", "Wait until the jobs that the message names have ended, or cancel them."
    STEP_NOT_KEPT = "step_not_kept", "The step of the job has no checkpoint that could be published.", "Choose one of the steps that the message names; submit jobs with 'keep_steps'."
    NO_RECIPE = "no_recipe", "The job publishes a step of another job, so no request produces its model again by itself.", "Read the recipe of the job that its request names in 'resume_from'."
    NO_REPORT = "no_report", "The job has not succeeded, so it has no report.", "Wait until the job has succeeded."
    JOB_CHANGED = "job_changed", "The job is not the one that 'If-Match' names.", "Read the job again, and send its new 'ETag'."
    JOB_DELETED = "job_deleted", "The job that this Idempotency-Key created was deleted.", "Use a new Idempotency-Key."
    IDEMPOTENCY_KEY_REUSED = "idempotency_key_reused", "The Idempotency-Key was used with another body.", "Use a new Idempotency-Key."
    TOO_MANY_JOBS = "too_many_jobs", "The API key has as many unfinished jobs as it may have.", "Wait as long as 'Retry-After' says.", True
    RATE_LIMITED = "rate_limited", "The API key sent more requests than it may send.", "Wait as long as 'Retry-After' says.", True
    TOO_MANY_AT_ONCE = "too_many_at_once", "The API key has as many waiting requests or bodies at once as it may have.", "Wait until one of them has ended.", True
    WEBHOOKS_DISABLED = "webhooks_disabled", "This service does not send webhooks.", "Ask the operator to set SECATEUR_WEBHOOK_SECRET."
    WEBHOOK_URL_FORBIDDEN = "webhook_url_forbidden", "Webhooks may not be sent to this address.", "Use a public address, or ask the operator to set SECATEUR_WEBHOOK_NETWORKS."
    STORAGE_UNAVAILABLE = "storage_unavailable", "The service's object store does not answer as it should.", "Try again later; the operator sees the reason in the log and in 'secateur doctor'.", True
    STORAGE_QUOTA_EXCEEDED = "storage_quota_exceeded", "The artifacts of the API key's jobs and its data sets have as many bytes as they may have.", "Delete jobs and data sets that are no longer needed."
    DATABASE_UNAVAILABLE = "database_unavailable", "The service's database does not answer.", "Wait as long as 'Retry-After' says; nothing was changed that was not confirmed.", True
    # fmt: on


class PruningError(Exception):
    """A model cannot be pruned as requested. ``message`` says why and what is allowed.

    ``field`` names the request's field at fault, where there is one.
    """

    def __init__(self, code: ErrorCode, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.field = field

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed later without a change."""
        return self.code.retryable

    def as_dict(self) -> dict[str, Any]:
        """Return the error in the form that ``jobs.error`` stores and the API shows."""
        return {"code": self.code, "message": self.message, "retryable": self.retryable, "field": self.field}
