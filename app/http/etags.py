"""Entity tags (RFC 9110, section 8.8.3): a version number in quotes."""


def etag(version: int) -> str:
    """The tag of a version."""
    return f'"{version}"'


def matches(if_none_match: str, tag: str) -> bool:
    """Whether ``If-None-Match`` names the tag; comparison is weak, as section 13.1.2 asks."""
    names = [name.strip().removeprefix("W/") for name in if_none_match.split(",")]
    return "*" in names or tag in names
