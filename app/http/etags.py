"""Entity tags (RFC 9110, section 8.8.3): a version number in quotes."""


def etag(version: int) -> str:
    """Return the entity tag of a version."""
    return f'"{version}"'


def names(if_match: str, tag: str) -> bool:
    """Return whether ``If-Match`` names the tag; the comparison is strong, as RFC 9110 (section 13.1.1) requires."""
    listed = [name.strip() for name in if_match.split(",")]
    return "*" in listed or tag in listed


def matches(if_none_match: str, tag: str) -> bool:
    """Return whether ``If-None-Match`` names the tag; the comparison is weak, as RFC 9110 (section 13.1.2) requires."""
    names = [name.strip().removeprefix("W/") for name in if_none_match.split(",")]
    return "*" in names or tag in names
