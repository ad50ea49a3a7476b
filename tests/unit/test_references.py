"""URLs that stand where a path may: parsed, told from paths, and written without secrets."""

from __future__ import annotations

from pathlib import Path

import pytest

from image_classifier.credentials import hide_in_urls
from image_classifier.errors import SettingsError
from image_classifier.references import describe_place, get_url

SIGNED = "https://host/a%20b.tar?X-Amz-Signature=hunter2"


@pytest.mark.parametrize(
    ("text", "written", "name"),
    [
        ("s3://bucket", "s3://bucket", "bucket"),
        ("s3://bucket/a/b/", "s3://bucket/a/b", "b"),
        ("gs://bucket/a b", "gs://bucket/a b", "a b"),
        ("file:///tmp/x", "file:///tmp/x", "x"),
        ("http://[::1]:8000/x", "http://[::1]:8000/x", "x"),
        (SIGNED, "https://host/a%20b.tar", "a b.tar"),
    ],
)
def test_a_url_is_the_same_as_text_and_as_a_path(text: str, written: str, name: str) -> None:
    for place in (text, Path(text)):
        url = get_url(place)
        assert url is not None and str(url) == written == describe_place(place) and url.name == name
        assert "hunter2" not in repr(url)


def test_what_is_no_url_is_a_path() -> None:
    for place in ("data/x", "/s3:/x", "models:/shapes@champion", "db:birds@3", "C:/x", "s3:bucket", "ftp://host/x"):
        assert get_url(place) is None and describe_place(place) == place
    url = get_url("file:///tmp/a%20b")
    assert url is not None and url.find_local_path() == Path("/tmp/a b")


@pytest.mark.parametrize(
    "text",
    ["s3://key:hun/ter2@bucket/x", "https://hunter2@host/x", "https://a:hunter2@host/x", "gs://", "s3://b/x?hunter2"]
    + ["https://host/x#hunter2", "s3://b//x", "s3://b/../x", "https://host/%2e%2e", "https://host/a%2Fb"],
)
def test_a_url_with_secrets_or_without_a_host_is_refused_unseen(text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        get_url(text)
    assert "ter2" not in str(caught.value)


def test_secrets_in_the_urls_of_a_text_become_stars() -> None:
    stars = "********"
    for text, hidden in {
        f"{SIGNED} failed": f"https://host/a%20b.tar?{stars} failed",
        f"--dataset_folder={Path(SIGNED)}": f"--dataset_folder=https:/host/a%20b.tar?{stars}",
        "s3://key:hun/ter2@bucket/x is none": f"s3://{stars}@bucket/x is none",
        "postgresql://me:hunter2@host/db": f"postgresql://{stars}@host/db",
        "models:/shapes@champion, what? s3://bucket/x": "models:/shapes@champion, what? s3://bucket/x",
    }.items():
        assert hide_in_urls(text) == hidden
