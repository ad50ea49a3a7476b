"""PostgreSQL that is set up against us, or that stops to answer: the same bits as ever, or one line that says why."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from image_classifier.data.corrections import Correction, correct_labels
from image_classifier.data.database import list_datasets, load_version_snapshot
from image_classifier.data.dataset import load_snapshot
from image_classifier.data.ingest import Listener, ingest
from image_classifier.data.revision import open_database, upgrade_database
from image_classifier.errors import DatabaseError
from image_classifier.references import Reference
from tests.databases import Home, make_home, make_home_in, swap_label, write_source
from tests.postgres import PASSWORD, Cluster
from tests.runs import write_image_folder


@pytest.fixture
def remote(tmp_path: Path, request: pytest.FixtureRequest) -> Home:
    """A database in PostgreSQL."""
    return make_home("postgresql", tmp_path, request)


def change(home: Home, *commands: str, **names: str) -> None:
    """Change the database, or its defaults, as the owner."""
    assert home.cluster is not None
    home.cluster.execute(home.database, *(command.format(db=home.database, **names) for command in commands))


def use_all(home: Home, source: Path, folder: Path) -> None:
    """Ingest, freeze, correct, list and read, and hold what comes out against the files."""
    expected = load_snapshot(source)
    assert ingest(source, "birds", home.access, chunk_size=7).version.digest == expected.digest
    snapshot = load_version_snapshot(Reference("birds"), home.elsewhere(folder / "first"))
    assert snapshot.digest == expected.digest
    with open_database(home.access) as database:
        _, other = swap_label(expected.labels, 3)
        version, num_changed = correct_labels(database, Reference("birds"), [Correction(3, other)], "why")
        assert (num_changed, len(list_datasets(database)[0].versions)) == (1, 2)
    corrected = load_version_snapshot(Reference("birds"), home.elsewhere(folder / "second"))
    assert corrected.digest == version.digest != expected.digest
    assert [int(label) for label in (corrected.labels != expected.labels).nonzero()[0]] == [3]


HARMLESS = {
    "client_encoding of no encoding": ["client_encoding = 'SQL_ASCII'"],
    "client_encoding": ["client_encoding = 'LATIN1'"],
    "dates": ["DateStyle = 'SQL, DMY'", "IntervalStyle = 'iso_8601'", "TimeZone = 'Asia/Kolkata'"],
    "dates of Germany": ["DateStyle = 'German'"],
    "strings": ["standard_conforming_strings = off", "backslash_quote = off", "quote_all_identifiers = on"],
    "bytes": ["bytea_output = 'escape'", "extra_float_digits = -15"],
    "isolation": ["default_transaction_isolation = 'serializable'", "default_transaction_deferrable = on"],
    "plans": [
        "enable_seqscan = off",
        "jit_above_cost = 0",
        "work_mem = '64kB'",
        "plan_cache_mode = force_generic_plan",
    ],
    "arrays": ["transform_null_equals = on", "array_nulls = off"],
    "locks": ["lock_timeout = '1ms'"],
    "row security": ["row_security = off"],
}


@pytest.mark.parametrize("name", HARMLESS)
def test_a_server_s_defaults_do_not_change_a_bit(name: str, remote: Home, tmp_path: Path) -> None:
    change(remote, *(f"ALTER DATABASE {{db}} SET {setting}" for setting in HARMLESS[name]))
    use_all(remote, write_source(tmp_path / "source"), tmp_path)


SHADOWS = (
    "CREATE SCHEMA evil",
    "CREATE FUNCTION evil.count() RETURNS bigint LANGUAGE sql AS 'SELECT 0::bigint'",
    "CREATE FUNCTION evil.max(int) RETURNS int LANGUAGE sql AS 'SELECT 0'",
    "CREATE FUNCTION evil.clock_timestamp() RETURNS timestamptz LANGUAGE sql AS $$SELECT 'epoch'::timestamptz$$",
    "CREATE FUNCTION evil.pg_try_advisory_lock(int, int) RETURNS bool LANGUAGE sql AS 'SELECT false'",
    'ALTER DATABASE {db} SET search_path = evil, pg_catalog, "$user", public',
)


def test_functions_of_another_schema_are_not_called_in_the_place_of_the_server_s(remote: Home, tmp_path: Path) -> None:
    upgrade_database(remote.access)
    change(remote, *SHADOWS, "GRANT ALL ON SCHEMA evil TO PUBLIC")
    use_all(remote, write_source(tmp_path / "source"), tmp_path)


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII", "EUC_JP"])
def test_a_database_of_another_encoding_keeps_the_names_of_classes(encoding: str, remote: Home, tmp_path: Path) -> None:
    assert remote.cluster is not None and remote.access.config is not None
    name = f"{remote.database}_{encoding.lower()}"
    create = f"CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'"
    remote.cluster.execute("postgres", create)
    config = remote.cluster.write_config(remote.access.config.with_name("other.yaml"), name)
    access = replace(remote.access, config=config)
    source = write_image_folder(tmp_path / "source", ["猫", "ñ", "ü 'quoted' \\"])
    ingested = ingest(source, "cats", access)
    assert ingested.version.dataset.classes == load_snapshot(source).classes
    assert ingested.version.digest == load_snapshot(source).digest


REFUSED = {
    "statement_timeout": (["SET statement_timeout = '1ms'"], r"ended a statement .*: raise statement_timeout of owner"),
    "idle transaction": (
        ["SET idle_in_transaction_session_timeout = '1ms'"],
        "raise idle_in_transaction_session_timeout of owner|raise the server's limits on idle sessions",
    ),
    "read only": (["SET default_transaction_read_only = on"], "only lets owner read .*: use a role and a server that"),
    "no schema": (["SET search_path = ''"], "has no schema for new tables|has no tables .* in its search_path"),
    "no room": (
        ["SET temp_file_limit = 0", "SET work_mem = '64kB'"],
        "gives owner too little room .*: raise its limit",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_server_that_does_not_let_us_work_says_which_limit_it_is(name: str, remote: Home, tmp_path: Path) -> None:
    settings, words = REFUSED[name]
    upgrade_database(remote.access)
    change(remote, *(f"ALTER DATABASE {{db}} {setting}" for setting in settings))
    config = yaml.safe_load(remote.access.config.read_text()) if remote.access.config else {}
    assert remote.access.config is not None
    remote.access.config.write_text(yaml.safe_dump({**config, "num_tries": 1}))
    source = write_source(tmp_path / "source", num_train=300, num_test=60)
    with pytest.raises(DatabaseError, match=words) as caught:
        ingest(source, "birds", remote.access, chunk_size=5)  # some statement is late, whatever the machine
        load_version_snapshot(Reference("birds"), remote.access)  # this alone sorts images, which takes room
    assert "\n" not in str(caught.value)


ROLES = {
    "no rights": ([], "does not allow {role} to do this .permission denied for table alembic_version"),
    "no schema": (
        ["REVOKE USAGE ON SCHEMA public FROM PUBLIC"],
        "has no tables of image_classifier in its search_path",
    ),
    "no connection": (["REVOKE CONNECT ON DATABASE {db} FROM PUBLIC"], "does not allow {role} .*CONNECT privilege"),
    "no login": (["ALTER ROLE {role} NOLOGIN"], "does not let {role} in: correct the user"),
    "no connection left": (["ALTER ROLE {role} CONNECTION LIMIT 0"], "has no connection left: try again later"),
    "expired": (["ALTER ROLE {role} VALID UNTIL '2000-01-01'"], "refuses the password of {role}"),
    "hidden rows": (
        [
            "GRANT SELECT ON alembic_version, datasets, samples, corrections, versions TO {role}",
            "ALTER TABLE samples ENABLE ROW LEVEL SECURITY",
            "CREATE POLICY half ON samples USING (position % 2 = 0)",
        ],
        "does not allow {role} to do this .query would be affected by row-level security policy",
    ),
}


@pytest.mark.parametrize("name", ROLES)
def test_a_role_that_may_not_read_is_told_what_it_lacks(name: str, remote: Home, tmp_path: Path) -> None:
    commands, words = ROLES[name]
    role = f"role_{remote.database}"
    ingest(write_source(tmp_path / "source"), "birds", remote.access)
    change(remote, f"CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}'", *commands, role=role)
    assert remote.cluster is not None and remote.access.config is not None
    config = remote.cluster.write_config(remote.access.config.with_name("role.yaml"), remote.database, user=role)
    access = replace(remote.access, config=config, dataset_folder=tmp_path / "elsewhere")
    with pytest.raises(DatabaseError, match=words.format(role=role)) as caught:
        load_version_snapshot(Reference("birds"), access)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "elsewhere").rglob("*"))


def test_a_server_with_no_connection_left_says_so(tmp_path: Path) -> None:
    cluster = Cluster("-cmax_connections=4", "-csuperuser_reserved_connections=3")
    try:
        cluster.start()
        home = make_home_in(cluster, tmp_path, tmp_path)
        change(home, f"CREATE ROLE other LOGIN PASSWORD '{PASSWORD}'")
        config = cluster.write_config(tmp_path / "other.yaml", home.database, user="other")
        with cluster.connect(home.database), cluster.connect(home.database):
            with pytest.raises(DatabaseError, match="has no connection left: try again later"):
                load_version_snapshot(Reference("birds"), replace(home.access, config=config))
    finally:
        cluster.remove()


# A server that stops to answer.


class Stoppable:
    """A server of a test's own, whose processes can be stopped, as a machine that swaps or a debugger stops them."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def stop(self, for_s: float | None = None) -> None:
        """Stop all processes, and let them go on after a time."""
        self._signal(signal.SIGSTOP)
        if for_s is not None:
            threading.Timer(for_s, self.go_on).start()

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        assert self._cluster._process is not None
        for pid in (self._cluster._process.pid, *self._cluster._list_children()):
            with suppress(ProcessLookupError):
                os.kill(pid, number)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        Stoppable(cluster).go_on()
        cluster.remove()


@pytest.fixture
def impatient(cluster: Cluster, tmp_path: Path) -> Iterator[tuple[Home, Stoppable]]:
    """A database that is waited for for seconds only, and its server."""
    folder = tmp_path / "home"
    folder.mkdir()
    home = make_home_in(cluster, tmp_path, folder)
    limits = {"timeout_s": 1, "answer_timeout_s": 2, "num_tries": 2}
    config = cluster.write_config(tmp_path / "impatient.yaml", home.database, **limits)
    yield replace(home, access=replace(home.access, config=config)), Stoppable(cluster)
    Stoppable(cluster).go_on()


def test_a_server_that_accepts_nobody_is_given_up(impatient: tuple[Home, Stoppable], tmp_path: Path) -> None:
    home, server = impatient
    ingest(write_source(tmp_path / "source"), "birds", home.access)
    server.stop()
    started = time.monotonic()
    with pytest.raises(DatabaseError, match=r"cannot be made \(connection timeout expired\): start the server"):
        load_version_snapshot(Reference("birds"), home.elsewhere(tmp_path / "elsewhere"))
    assert time.monotonic() - started < 60
    assert not list((tmp_path / "elsewhere").iterdir())


class StopAfter(Listener):
    """Stops the server when so many chunks are in."""

    def __init__(self, server: Stoppable, num_chunks: int, for_s: float | None) -> None:
        self._server, self._num_chunks, self._for_s = server, num_chunks, for_s

    def commit(self, num_images: int) -> None:
        self._num_chunks -= 1
        if self._num_chunks == 0:
            self._server.stop(self._for_s)


def test_a_server_that_stops_during_an_ingest_is_given_up_and_the_next_one_goes_on(
    impatient: tuple[Home, Stoppable], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home, server = impatient
    source = write_source(tmp_path / "source")
    with pytest.raises(DatabaseError, match="was lost and could not be made again in 2 tries"):
        ingest(source, "birds", home.access, chunk_size=4, listener=StopAfter(server, 3, None))
    assert "has not answered for" in caplog.text and "giving up" in caplog.text
    server.go_on()
    ingested = ingest(source, "birds", home.access, chunk_size=4)
    assert ingested.added.num_present >= 9 and ingested.added.num_added + ingested.added.num_present == 30
    assert ingested.version.digest == load_snapshot(source).digest


@pytest.mark.parametrize("for_s", [0.5, 3.5], ids=["in time", "after it was given up"])
def test_a_server_that_answers_again_costs_nothing_but_time(
    for_s: float, impatient: tuple[Home, Stoppable], tmp_path: Path
) -> None:
    home, server = impatient
    config = yaml.safe_load(home.access.config.read_text()) if home.access.config else {}
    assert home.access.config is not None
    home.access.config.write_text(yaml.safe_dump({**config, "num_tries": 20}))
    source = write_source(tmp_path / "source")
    ingested = ingest(source, "birds", home.access, chunk_size=4, listener=StopAfter(server, 3, for_s))
    assert ingested.version.digest == load_snapshot(source).digest


def test_a_wait_is_said(
    impatient: tuple[Home, Stoppable],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from image_classifier.data import connection

    monkeypatch.setattr(connection, "_PATIENCE_S", 0.2)
    home, server = impatient
    source = write_source(tmp_path / "source")
    with caplog.at_level(logging.WARNING):
        ingest(source, "birds", home.access, chunk_size=4, listener=StopAfter(server, 3, 1))
    assert "still waiting for an answer of" in caplog.text and "giving up" not in caplog.text
