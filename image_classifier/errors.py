"""The errors that are expected: each ends a command with one line and exit status 2.

::

    ImageClassifierError
    ├── SettingsError        a setting out of range, of the wrong type, or at odds with another
    ├── DataError            a data set that is missing, damaged, hostile, or not the one named
    │   ├── ImageError       one image that cannot be read
    │   ├── DownloadError    the data set could not be fetched
    │   └── DatabaseError    the database cannot be reached, refuses, or lacks what was asked for
    ├── ModelError           a model file that is missing, damaged, hostile, or of another network
    │   └── VerdictError     somebody who counts says that a run trained again is DIFFERENT: exit status 3
    ├── RunError             a run folder that exists, is missing, unfinished, or was changed
    │   ├── RunBusyError     another process is training into it
    │   └── DivergedError    the loss of a training is not a number any more
    ├── RankError            a process of several that train together was lost
    ├── RegistryError        a registry that cannot be reached, refuses, or lacks what was named
    ├── RemoteError          a folder elsewhere that cannot be reached, refuses, changed, or is not what was sent
    ├── ServerError          a server that cannot be reached, or refuses a request
    ├── StorageError         the disk refuses: full, read-only, no permission
    └── Interrupted          a run was asked to stop and has saved its state

The message is a whole sentence for the person at the terminal: what was wrong, what was got, and the remedy.
Any other exception is a defect of this package, and keeps its trace.
"""


class ImageClassifierError(Exception):
    """An expected error; its message is what the user reads."""


class SettingsError(ImageClassifierError):
    """A setting is out of range, of the wrong type, or at odds with another."""


class DataError(ImageClassifierError):
    """A data set is missing, damaged, hostile, or not the one that was named."""


class ImageError(DataError):
    """One image cannot be read."""


class ImageSizeError(ImageError):
    """One image has more pixels than are to be decoded."""


class DownloadError(DataError):
    """The data set could not be fetched."""


class DatabaseError(DataError):
    """The database cannot be reached, refuses, or lacks what was asked for."""


class ModelError(ImageClassifierError):
    """A model file is missing, damaged, hostile, or of another network."""


class VerdictError(ModelError):
    """Somebody who counts has signed that a run trained again is DIFFERENT."""


class RunError(ImageClassifierError):
    """A run folder exists already, is missing, unfinished, in use, or was changed."""


class RunBusyError(RunError):
    """Another process is training into a run folder."""


class DivergedError(RunError):
    """The loss of a training is not a number any more."""


class RankError(ImageClassifierError):
    """A process of several that train together was lost, or another data set, setting or machine."""


class RegistryError(ImageClassifierError):
    """A registry of models cannot be reached, refuses, or lacks what was named."""


class RemoteError(ImageClassifierError):
    """A folder that lies elsewhere cannot be reached, refuses, was changed meanwhile, or is not what was sent."""


class ServerError(ImageClassifierError):
    """A server cannot be reached, or refuses a request.

    Attributes:
        status: of its HTTP answer; 0 where none came.
        kind: of the problem, such as queue-full; empty where the server does not say.
    """

    def __init__(self, message: str, *, status: int = 0, kind: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind


class StorageError(ImageClassifierError):
    """The disk refuses a write: full, read-only, or without permission."""


class Interrupted(ImageClassifierError):
    """A run was asked to stop and has saved its state."""
