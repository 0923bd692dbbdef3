"""Encryption at rest for secrets that must be read again (Hub tokens), with Fernet of the ``cryptography`` package.

The first key of ``SECATEUR_SECRET_KEYS`` encrypts and every key decrypts; an operator puts a new key in front of the
old ones.
"""

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from pydantic import SecretStr

from app.config import Settings


class VaultError(Exception):
    """The service has no encryption key, or not the key that a secret was encrypted with; the message says which."""


def encrypt(settings: Settings, secret: SecretStr) -> bytes:
    """Return ``secret`` in encrypted form, which may be stored.

    Raises:
        VaultError: the service has no encryption key.
    """
    return _cipher(settings).encrypt(secret.get_secret_value().encode())


def decrypt(settings: Settings, stored: bytes) -> SecretStr:
    """Return the secret whose encrypted form is ``stored``.

    Raises:
        VaultError: the service does not have the key that the secret was encrypted with.
    """
    try:
        return SecretStr(_cipher(settings).decrypt(stored).decode())
    except InvalidToken:
        raise VaultError("none of SECATEUR_SECRET_KEYS is the one that this was encrypted with") from None


def readable(settings: Settings, stored: bytes) -> bool:
    """Return whether the service has the key that ``stored`` was encrypted with."""
    try:
        decrypt(settings, stored)
    except VaultError:
        return False
    return True


def _cipher(settings: Settings) -> MultiFernet:
    if settings.secret_keys is None:
        raise VaultError("this service has no SECATEUR_SECRET_KEYS to keep tokens with")
    return MultiFernet([Fernet(key) for key in settings.secret_keys.get_secret_value().split(",")])
