"""What the errors of a database mean, and the remedy."""

from __future__ import annotations

import re
import sqlite3

from sqlalchemy.exc import DBAPIError, OperationalError

from image_classifier.data.place import Place
from image_classifier.errors import DatabaseError, ImageClassifierError, StorageError
from image_classifier.text import one_line

UPGRADE = "`image_classifier data upgrade`"
BUSY_TIMEOUT_S = 60  # how long SQLite waits for another process that writes


def is_loss(error: DBAPIError) -> bool:
    """Say whether the connection was lost, or could not be made because the server is just starting or stopping."""
    state = getattr(error.orig, "sqlstate", None)
    if isinstance(error.orig, sqlite3.Error):
        return False
    if state is None:
        return error.connection_invalidated or isinstance(error, OperationalError)
    return error.connection_invalidated or state.startswith(("08", "57P"))


_REFUSALS = {
    "28P01": "refuses the password of {user}: correct DB_PASSWORD, or the file of --db_pass_file",
    "28000": "does not let {user} in: correct the user, or the server's pg_hba.conf",
    "3D000": "does not exist on the server: correct the key database of --db_config, or create it",
    "42501": "does not allow {user} to do this ({reason}): use a role that may",
    "25006": "only lets {user} read ({reason}): use a role and a server that may write",
    "25P03": "ended the session ({reason}): raise idle_in_transaction_session_timeout of {user}",
    "3F000": "has no schema for new tables ({reason}): set the search_path of {user}",
    "57014": "ended a statement before it was done ({reason}): raise statement_timeout of {user}",
    "57P05": "ended the session ({reason}): raise idle_session_timeout of {user}",
    "53400": "gives {user} too little room to work in ({reason}): raise its limit",
    "42P01": "lacks a table ({reason}): create it with " + UPGRADE,
    "42703": "lacks a column ({reason}): create it with " + UPGRADE,
    "53300": "has no connection left: try again later",
    "55P03": "has another process that ingests into this data set: wait until it has ended",
}


def explain(error: DBAPIError, place: Place, num_tries: int = 1) -> ImageClassifierError:
    """Say in one line what the database or the way to it refused, with the remedy."""
    cause = error.orig
    reason = one_line(cause).removeprefix("connection failed: ")
    state = getattr(cause, "sqlstate", None)
    user = place.user or "this user"
    if state in ("53100", "53200") or "disk is full" in reason:
        return StorageError(f"the disk of the database {place.title} is full: {reason}; free some space")
    if isinstance(cause, sqlite3.Error):
        return _explain_sqlite(reason, place)
    if state is None and "no password supplied" in reason:
        return DatabaseError(
            f"{place.title} asks for the password of {user}: give it as DB_PASSWORD in the environment, or by "
            "--db_pass_file"
        )
    for code, words in _REFUSALS.items():  # while connecting, psycopg knows the words alone
        if state == code or (state is None and code in _WORDS and re.search(_WORDS[code], reason)):
            return DatabaseError(f"{place.title} {words.format(user=user, reason=reason)}")
    if state is None and ("certificate" in reason or "SSL" in reason):
        return DatabaseError(
            f"{place.title} cannot be trusted ({reason}): name its certificate as tls_root in --db_config, or give the "
            "server a valid one"
        )
    if is_loss(error):
        what = f"was lost and could not be made again in {num_tries} tries" if num_tries > 1 else "cannot be made"
        return DatabaseError(
            f"the connection to {place.title} {what} ({reason}): start the server, correct host and port in "
            "--db_config, or raise the server's limits on idle sessions"
        )
    return DatabaseError(f"{place.title} refuses: {reason}")


_WORDS = {
    "28P01": "password authentication failed",
    "28000": 'no pg_hba.conf entry|is not permitted to log in|role ".*" does not exist',
    "3D000": 'database ".*" does not exist',
    "42501": "permission denied for database",
    "53300": "too many c|connection slots are reserved|connection limit exceeded",
}
"""What the refusal of a connection says in words alone."""


def _explain_sqlite(reason: str, place: Place) -> ImageClassifierError:
    if "locked" in reason:
        return DatabaseError(f"another process has used {place.title} for {BUSY_TIMEOUT_S} s: try again later")
    if "readonly" in reason or "unable to open" in reason:
        return DatabaseError(f"{place.title} cannot be written ({reason}): choose a writable folder")
    if "no such table" in reason or "no such column" in reason:
        return DatabaseError(f"{place.title} lacks some of its tables ({reason}): create them with {UPGRADE}")
    if "I/O error" in reason:
        return StorageError(
            f"the disk of the database {place.title} fails ({reason}): free some space, or check the disk"
        )
    return DatabaseError(f"{place.title} is not a complete SQLite database ({reason}): restore it from a backup")
