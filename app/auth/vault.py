"""Secrets that must be read again (Hub tokens), encrypted at rest: Fernet of the ``cryptography`` package.

The first of ``SECATEUR_SECRET_KEYS`` encrypts, each of them decrypts: a new one is put in front of the old.
"""

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from pydantic import SecretStr

from app.config import Settings


class VaultError(Exception):
    """There is no key, or none that this was encrypted with; the message says what to do."""


def encrypt(settings: Settings, secret: SecretStr) -> bytes:
    """What may be stored of ``secret``.

    Raises:
        VaultError: the service has no key.
    """
    return _cipher(settings).encrypt(secret.get_secret_value().encode())


def decrypt(settings: Settings, stored: bytes) -> SecretStr:
    """The secret that was stored.

    Raises:
        VaultError: the service does not have the key that it was encrypted with.
    """
    try:
        return SecretStr(_cipher(settings).decrypt(stored).decode())
    except InvalidToken:
        raise VaultError("none of SECATEUR_SECRET_KEYS is the one that this was encrypted with") from None


def _cipher(settings: Settings) -> MultiFernet:
    if settings.secret_keys is None:
        raise VaultError("this service has no SECATEUR_SECRET_KEYS to keep tokens with")
    return MultiFernet([Fernet(key) for key in settings.secret_keys.get_secret_value().split(",")])
