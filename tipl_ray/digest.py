"""Configurations as plain tables: what is published of them, what they are called by, and what is not shown."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote


def as_table(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON types, fit to be published: its URIs are `redacted`."""
    return published(json.loads(json.dumps(dataclasses.asdict(config))))


def identity(config: Any) -> dict[str, Any]:
    """What of a configuration a result depends on, as `as_table` has it: all digests and names of folders are of this.

    Left out are fields whose metadata say {"identity": False}, as what something is called and where it runs, and those
    that say {"later": True} while they have their default: what was made before there was such a field is still found.
    For the same reason a configuration's `REMOVED` fields are added, at the values that they had by default.
    """
    table = as_table(config) | getattr(config, "REMOVED", {})
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        if not field.metadata.get("identity", True) or (field.metadata.get("later") and value == default):
            del table[field.name]
        elif dataclasses.is_dataclass(value):
            table[field.name] = identity(value)
    return table


SHOWN_OPTIONS = (
    "endpoint_override",
    "scheme",
    "region",
    "host",
    "port",
    "user",
    "dbname",
    "sslmode",
    "charset",
    "driver",
)
"""Options of a URI that hold no secret; the values of others are not shown."""


def redacted(uri: str) -> str:
    """The URI as it may be shown, logged and written: *** for its password or token and for options not known harmless.

    >>> redacted("postgresql://me:secret@host/runs?sslmode=require&sslpassword=secret")
    'postgresql://me:***@host/runs?sslmode=require&sslpassword=***'
    >>> redacted("https://token@host:5000"), redacted("sqlite:////data/a:b@c.db"), redacted("s3://bucket/run@2")
    ('https://***@host:5000', 'sqlite:////data/a:b@c.db', 's3://bucket/run@2')
    """
    scheme, place = re.fullmatch(r"([A-Za-z][\w+.-]*:/+)?(.*)", uri, re.DOTALL).groups("")  # type: ignore[union-attr]
    user, at = "", ""
    if 0 < scheme.count("/") < 3 or (not scheme and not place.startswith("/")):
        before_options = place.partition("?")[0]
        # A password may hold any sign, the question mark too: what follows a colon is one unless it is a port.
        odd = "@" in place and re.match(r"[^/:@]*:(?!\d+(/|$))", before_options)
        user, at, place = place.rpartition("@") if odd or "@" in before_options else ("", "", place)
    if ":" in user:
        user = f"{user.partition(':')[0]}:***"
    elif scheme.lower().startswith("http") and at:
        user = "***"
    if scheme:
        place, mark, options = place.partition("?")
        place += mark + re.sub(r"([^&;=]+)(=?)([^&;]*)", _shown_option, options)
    return f"{scheme}{user}{at}{place}"


def _shown_option(option: re.Match[str]) -> str:
    name, equals, value = option.groups()
    if not equals or name not in SHOWN_OPTIONS:
        return f"{name}=***" if equals else "***"
    return f"{name}={value if redacted(unquote(value)) == unquote(value) else redacted(unquote(value))}"


def published(part: Any) -> Any:
    """Plain JSON types with every URI in them `redacted`."""
    if isinstance(part, dict):
        return {name: published(value) for name, value in part.items()}
    if isinstance(part, list):
        return [published(value) for value in part]
    return redacted(part) if isinstance(part, str) and ":/" in part else part


def flat(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """A table's values by their dotted names.

    >>> dict(flat({"basis": {"kind": "trial", "rank": 64}, "name": "demo"}))
    {'basis.kind': 'trial', 'basis.rank': 64, 'name': 'demo'}
    """
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def digest(*parts: Any) -> str:
    """First 16 hexadecimal digits of the SHA-256 of the parts' canonical JSON; of a dataclass, its `identity`."""
    plain = [identity(part) if dataclasses.is_dataclass(part) else part for part in parts]
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
