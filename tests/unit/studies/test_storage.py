from __future__ import annotations

import threading
from pathlib import Path

import optuna
import pytest

from image_classifier.errors import DatabaseError, SettingsError, StorageError
from image_classifier.studies.storage import Storage, check_file_system, parse_storage

MOUNTS = """\
22 1 252:0 / / rw,relatime - ext4 /dev/root rw
40 22 0:40 / /mnt/nfs rw,relatime shared:1 - nfs4 server:/mnt/nfs rw
41 40 0:41 / /mnt/nfs/me/my\\040disk rw,relatime - xfs /dev/sdb rw
42 22 0:42 / /mnt/share rw - cifs //server/share rw
43 22 0:43 / /mnt/ssh rw - fuse.sshfs me@host: rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/data/sweep.db", ""),
        ("/mnt/nfs/me/sweep.db", "nfs4"),
        ("/mnt/nfs/me/my disk/sweep.db", ""),
        ("/mnt/nfs2/sweep.db", ""),
        ("/mnt/share/a/b/sweep.db", "cifs"),
        ("/mnt/ssh/sweep.db", "fuse.sshfs"),
    ],
)
def test_sqlite_on_a_network_file_system_is_refused(tmp_path: Path, path: str, kind: str) -> None:
    (tmp_path / "mountinfo").write_text(MOUNTS)
    if not kind:
        check_file_system(Path(path), tmp_path / "mountinfo")
        return
    with pytest.raises(SettingsError, match=rf"is on a network file system \({kind}\).*name a PostgreSQL"):
        check_file_system(Path(path), tmp_path / "mountinfo")


def test_a_system_without_a_list_of_mounts_refuses_nothing(tmp_path: Path) -> None:
    check_file_system(Path("/mnt/nfs/me/sweep.db"), tmp_path / "none")


@pytest.mark.parametrize(
    "address",
    [
        "postgresql://me:secret-word@host/db",
        "postgresql://me@host/db?password=secret-word",
        "postgresql://me@host/db?sslpassword=secret-word",
        "mysql://me:secret-word@host/db",
        "secret-word",
        "postgresql://me:secret-word@host:port/db",
    ],
)
def test_a_password_in_the_address_is_refused_and_not_shown(tmp_path: Path, address: str) -> None:
    with pytest.raises(SettingsError, match="--storage ") as caught:
        parse_storage(address, tmp_path)
    assert "secret-word" not in str(caught.value)


@pytest.mark.parametrize(
    "address", ["mysql://me@host/db", "sqlite://", "sqlite:///:memory:", "postgresql://me@/db", ""]
)
def test_other_storages_are_refused(tmp_path: Path, address: str) -> None:
    with pytest.raises(SettingsError, match="--storage takes postgresql://USER@HOST/DATABASE or sqlite:///FILE"):
        parse_storage(address, tmp_path)


def test_by_default_the_storage_is_a_file_in_the_experiments_folder(tmp_path: Path) -> None:
    assert parse_storage(None, tmp_path).file == tmp_path / "sweep.db"
    assert parse_storage(f"sqlite:///{tmp_path}/other.db", tmp_path).file == tmp_path / "other.db"


def test_changes_come_one_after_the_other(tmp_path: Path) -> None:
    storages = [Storage(parse_storage(None, tmp_path), "counted") for _ in range(3)]

    def count(study: optuna.Study) -> None:
        study.set_user_attr("count", study.user_attrs.get("count", 0) + 1)

    threads = [threading.Thread(target=lambda s=s: [s.change(count) for _ in range(10)]) for s in storages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert storages[0].change(lambda study: study.user_attrs["count"]) == 30


def test_what_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sweep.db").write_bytes(b"this is no database " * 100)
    with pytest.raises(DatabaseError, match=r"--storage: .*sweep.db cannot be used: .*not a database"):
        Storage(parse_storage(None, tmp_path), "study").change(lambda study: None)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="a file or a broken link is in the place of a folder"):
        Storage(parse_storage(None, tmp_path / "file" / "x"), "study").change(lambda study: None)


def test_a_server_that_does_not_answer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatabaseError, match=r"--storage: db at 127.0.0.1:1 cannot be used: .*refused"):
        Storage(parse_storage("postgresql://me@127.0.0.1:1/db", tmp_path), "study").change(lambda study: None)
