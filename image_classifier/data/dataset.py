"""Loads a data set by its reference: the path or URL of its files, or db:NAME[@VERSION] in the database."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from image_classifier.access import DatabaseAccess, Reading
from image_classifier.data.snapshot import Snapshot, load_folder_snapshot
from image_classifier.errors import DownloadError, RemoteError, SettingsError
from image_classifier.extras import load_extra
from image_classifier.image_sizes import ImageSize
from image_classifier.progress import track
from image_classifier.references import Reference, get_reference
from image_classifier.remote.cache import localize


@track("looking at the data set")
def load_snapshot(dataset_folder: Path, access: DatabaseAccess | None = None, reading: Reading = Reading()) -> Snapshot:
    """Map the snapshot of the data set at a path, and freeze the data set into one first if there is none yet.

    Args:
        dataset_folder: a dataset folder, or an archive, a Parquet file or tars themselves, by path or URL; or
            db:NAME[@VERSION].
        access: how the database is reached, for the last two.
        reading: how image files are read.

    Raises:
        DataError: there is no data set, or it is damaged, hostile, or not the one that `metadata.json` names.
        DownloadError: what lies at the URL cannot be had.
        SettingsError: what follows db: is no name, or image files are to be read in some way, but there are none.
        StorageError: the disk refused the snapshot; nothing is left of it.
    """
    reference = get_reference(dataset_folder)
    if reference is not None:
        if replace(reading, image_size=None) != Reading():
            raise SettingsError(
                f"--fit and --skip_bad apply only to files; the images of {dataset_folder} were already "
                "converted by `data ingest`: remove these options"
            )
        return load_from_database(reference, access or DatabaseAccess(), reading.image_size)
    try:
        path = localize(dataset_folder)
    except RemoteError as error:
        raise DownloadError(str(error)) from error
    return load_folder_snapshot(path, reading)


def load_from_database(reference: Reference, access: DatabaseAccess, image_size: ImageSize | None = None) -> Snapshot:
    """Map the snapshot of a data set in the database, as `database.load_version_snapshot` does.

    Raises:
        SettingsError: what it takes to reach a database is not installed; and as that function says.
    """
    load_extra("sqlalchemy", "database")

    from image_classifier.data.database import load_version_snapshot

    return load_version_snapshot(reference, access, image_size)
