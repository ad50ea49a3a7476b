"""Files of labels: what is read, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from image_classifier.capture.labels import load_labels
from image_classifier.errors import DataError

CLASSES = ("cat", "dog, small")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_labels_are_read_whatever_the_order_of_the_columns(tmp_path: Path) -> None:
    text = '\ufefflabel,note,request_id,image_index\r\n"dog, small",x,a,0\r\ncat,,a,10\r\ncat,again,a,10\r\n'
    assert load_labels(write(tmp_path / "l.csv", text), CLASSES) == {("a", 0): 1, ("a", 10): 0}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "has no column request_id"),
        ("request_id,label\na,cat\n", "has no column image_index"),
        ("request_id,image_index,label\na,0\n", "line 2: not a request_id, a whole number and one of the 2 classes"),
        ("request_id,image_index,label\na,0,bird\n", "line 2: not a request_id"),
        ("request_id,image_index,label\na,-1,cat\n", "line 2: not a request_id"),
        ("request_id,image_index,label\n,0,cat\n", "line 2: not a request_id"),
        ('request_id,image_index,label\na,0,cat\na,0,"dog, small"\n', "line 3: a second, different label for an image"),
        ('request_id,image_index,label\na,0,"cat\n', "unexpected end of data"),
        (f"request_id,image_index,label\na,{'9' * 5000},cat\n", "Exceeds the limit"),
        (f"request_id,image_index,label\na,0,{'c' * 200_000}\n", "field larger than field limit"),
    ],
)
def test_what_is_no_list_of_labels_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(DataError, match=f"is not a valid label file: .*{reason}.*; it is CSV with the columns"):
        load_labels(write(tmp_path / "l.csv", text), CLASSES)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        load_labels(tmp_path / "none.csv", CLASSES)
    (tmp_path / "latin").write_bytes(b"request_id,image_index,label\na,0,\xff\n")
    with pytest.raises(DataError, match="can't decode"):
        load_labels(tmp_path / "latin", CLASSES)
