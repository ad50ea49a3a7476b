from __future__ import annotations

import re

import optuna
from optuna.trial import FrozenTrial, TrialState

from image_classifier.studies.page import build_page, describe_spread
from image_classifier.studies.space import Parameter, Space

SPACE = Space((Parameter(name="flip", choices=("none", "random")), Parameter(name="translate", low=0, high=4)))


def make_trial(number: int, flip: str, translate: int, value: float | None, error: str = "") -> FrozenTrial:
    trial = optuna.create_trial(
        state=TrialState.COMPLETE if value is not None else TrialState.FAIL,
        value=value,
        params={"flip": flip, "translate": translate},
        distributions=SPACE.distributions,
        user_attrs={"error": error} if error else {"run": f"shapes/trial-{number:04}"},
    )
    trial.number = number
    return trial


TOLD = [make_trial(number, ("none", "random")[number % 2], number % 5, 0.5 + 0.01 * number) for number in range(8)]


def get_text(page: str) -> str:
    return re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


def test_a_page_has_all_plots_and_fetches_nothing() -> None:
    page = build_page("shapes", {"search": "tpe"}, SPACE, TOLD, [(0, 0.75), (1, 0.77)])
    assert len(re.findall(r'<div id="plot-\d"', page)) == 4
    assert "default-src 'none'" in page
    text = get_text(page)
    assert not re.findall(r"(?:src|href)=[\"']?(?!data:)[^\"'> ]+", text)
    assert "57.00 %" in text and "76.00 % ± 1.41 %" in text and "shapes/trial-0007" in text


def test_names_and_errors_of_others_are_escaped() -> None:
    told = [*TOLD, make_trial(8, "none", 0, None, "<script>alert(1)</script>")]
    page = build_page("<b>x</b>", {"a": "<i>"}, SPACE, told)
    assert "&lt;b&gt;x&lt;/b&gt;" in page and "&lt;script&gt;alert(1)" in page
    assert "<script>alert(1)" not in page and "<i>" not in get_text(page)


def test_trials_that_say_too_little_have_no_plots() -> None:
    page = build_page("shapes", {}, SPACE, TOLD[:1])
    assert page.count("There is no such plot: it takes two complete trials at least") == 4


def test_one_value_has_no_spread() -> None:
    assert describe_spread([0.5]) == "50.00 %"
