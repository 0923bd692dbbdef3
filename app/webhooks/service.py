"""Delivery of the webhooks in the outbox: messages are signed as Standard Webhooks (standardwebhooks.com) requires, and
retried for three days."""

import asyncio
import datetime as dt
import json
from collections.abc import Collection, Sequence

import httpx2
from sqlalchemy.orm import Session
from standardwebhooks import Webhook

from app.config import Settings
from app.webhooks import repository
from app.webhooks.addresses import Network
from app.webhooks.models import WebhookDelivery
from app.webhooks.transport import GuardedTransport

TIMEOUT = 10.0
"""Seconds that one whole attempt may take."""
BATCH = 32
BACKOFF = (5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400)
"""Waits between attempts in seconds: the schedule of the Standard Webhooks specification, three days in total."""
GONE = 410


def deliver_due(session: Session, settings: Settings) -> int:
    """Attempt the due deliveries in one batch, for at most ``TIMEOUT`` seconds, and return the number of attempts."""
    if settings.webhook_secret is None:
        return 0
    due = repository.claim_due(session, BACKOFF, BATCH)
    signer = Webhook(settings.webhook_secret.get_secret_value())
    statuses = asyncio.run(_post_all(signer, settings.webhook_networks, due)) if due else []
    for delivery, status in zip(due, statuses, strict=True):
        if isinstance(status, int) and 200 <= status < 300:
            repository.delivered(session, delivery.id)
        elif status == GONE:
            repository.failed(session, delivery.id, "410 Gone")
            repository.disable(session, delivery.url)
        else:
            repository.failed(session, delivery.id, str(status))
    return len(due)


async def _post_all(signer: Webhook, networks: Collection[Network], due: Sequence[WebhookDelivery]) -> list[int | str]:
    transport = GuardedTransport(networks)
    async with httpx2.AsyncClient(
        transport=transport, trust_env=False, follow_redirects=False, timeout=TIMEOUT
    ) as client:
        return await asyncio.gather(*(_post(client, signer, delivery) for delivery in due))


async def _post(client: httpx2.AsyncClient, signer: Webhook, delivery: WebhookDelivery) -> int | str:
    """Post one delivery and return the response's status, or the reason in words why there is none.

    The body of the response is not read.
    """
    body = json.dumps(delivery.payload)
    message_id, now = f"msg_{delivery.id.hex}", dt.datetime.now(dt.UTC)
    headers = {
        "content-type": "application/json",
        "webhook-id": message_id,
        "webhook-timestamp": str(int(now.timestamp())),
        "webhook-signature": signer.sign(message_id, now, body),
    }
    try:
        async with asyncio.timeout(TIMEOUT):
            async with client.stream("POST", delivery.url, content=body, headers=headers) as response:
                return response.status_code
    except (httpx2.HTTPError, httpx2.InvalidURL, TimeoutError, OSError) as error:
        return f"{type(error).__name__}: {error}"
