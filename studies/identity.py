"""Who a browser is: a keyed hash of the rater's id, carried in a signed cookie; the id itself is not kept."""

from __future__ import annotations

import hmac
import secrets

LONGEST_ID = 256
"""Characters of a rater's id."""


def rater_hash(key: str, study: str, rater: str) -> str:
    """HMAC-SHA256 of a rater's id in a study; without the key nobody can test a guess.

    Args:
        key: the study's secret, in hex.
        study: name of the study.
        rater: the platform's id of the person.
    """
    return hmac.new(bytes.fromhex(key), f"{study}\n{rater}".encode(), "sha256").hexdigest()


def cookie_name(schedule_hash: str) -> str:
    """Name of a study's cookie: browsers share cookies between the ports of a host, and studies must not."""
    return f"study-{schedule_hash[:12]}"


def anonymous() -> str:
    """An id for a rater who came without one."""
    return f"anonymous {secrets.token_hex(16)}"


def sign(key: str, value: str) -> str:
    """The cookie's content for a rater's hash."""
    return f"{value}.{hmac.new(bytes.fromhex(key), value.encode(), 'sha256').hexdigest()}"


def unsign(key: str, cookie: str | None) -> str | None:
    """The rater's hash in a cookie, or None where it is missing or forged."""
    value, _, signature = (cookie or "").partition(".")
    good = value and hmac.compare_digest(sign(key, value).encode(), (cookie or "").encode("utf-8", "replace"))
    return value if good and signature else None
