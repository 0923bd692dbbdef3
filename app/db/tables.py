"""All tables of the service, in one metadata object."""

from app.auth.models import ApiKey
from app.datasets.models import Dataset
from app.db.base import Base
from app.fleet.models import Worker
from app.http.idempotency import IdempotencyKey
from app.jobs.models import Attempt, Job, JobEvent, JobLogLine, JobStep
from app.jobs.repositories import Repository
from app.jobs.usage import Usage
from app.storage.models import Deletion, StorageIdentity, StoredFile
from app.tracking.models import TrackedRun
from app.webhooks.models import WebhookDelivery

metadata = Base.metadata
TABLES = (
    ApiKey,
    Attempt,
    Dataset,
    Deletion,
    IdempotencyKey,
    Job,
    JobEvent,
    JobLogLine,
    JobStep,
    Repository,
    StorageIdentity,
    StoredFile,
    TrackedRun,
    Usage,
    WebhookDelivery,
    Worker,
)
