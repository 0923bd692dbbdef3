"""The tokens that stay, and their new numbers."""

from dataclasses import dataclass
from functools import cached_property

from secateur.contract.errors import ErrorCode, PruningError


@dataclass(frozen=True)
class Vocabulary:
    """The token ids that stay, of a model whose embedding has ``rows`` rows.

    ``kept`` has the source's ids in ascending order. The position of an id in ``kept`` is the token's new id.
    """

    kept: tuple[int, ...]
    rows: int

    @cached_property
    def remap(self) -> dict[int, int]:
        """The new id of each kept token, by its id in the source."""
        return {old: new for new, old in enumerate(self.kept)}

    @property
    def size(self) -> int:
        """Number of rows of the new embedding."""
        return len(self.kept)

    def renumber(self, token: int, named_by: str) -> int:
        """Return the new id of the source's id ``token``, which the key ``named_by`` names.

        An id that names no row of the embedding, such as -1, is returned unchanged: it names no row of the smaller
        embedding either.

        Raises:
            PruningError: ``vocabulary_unsupported`` when the token is cut.
        """
        if not 0 <= token < self.rows:
            return token
        if token not in self.remap:
            raise unsupported(f"{named_by} names the token {token}, which is not among the tokens that stay")
        return self.remap[token]


def unsupported(reason: str) -> PruningError:
    """Return the error that says why a vocabulary cannot be cut."""
    return PruningError(
        ErrorCode.VOCABULARY_UNSUPPORTED, f"The vocabulary cannot be cut: {reason}.", field="vocabulary"
    )
