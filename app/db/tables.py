"""All tables of the service, in one metadata object."""

from app.auth.models import ApiKey
from app.db.base import Base
from app.fleet.models import Worker
from app.http.idempotency import IdempotencyKey
from app.jobs.models import Attempt, Job, JobEvent, JobStep
from app.webhooks.models import WebhookDelivery

metadata = Base.metadata
TABLES = (ApiKey, Attempt, IdempotencyKey, Job, JobEvent, JobStep, WebhookDelivery, Worker)
