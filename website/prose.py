"""Check the language of documents: no sentence over 25 words, and no word that has a plainer one.

    python -m website.prose README.md docs/concepts.md

Prints a line for each finding and exits with 1 if there is one. Code, comments, and tables that a benchmark writes are
left out. The pre-commit hook runs it over the documents that have changed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_WORDS = 25
UNCHECKED = ("CHANGELOG.md", "benchmarks/README.md")
"""Documents that are written for another reader: a history, and notes on measurements."""

AVOID = {
    r"\bgreyed out\b": "covered by a grey square (cutout)",
    r"\bin order to\b": "to",
    r"\bleverag\w+|\butiliz\w+|\butilis\w+": "use",
    r"\b(?:simply|obviously|of course|needless to say)\b": "leave it out",
    r"\b(?:seamless\w*|powerful|blazing\w*|state-of-the-art|cutting-edge|robust)\b": "say what was measured",
    r"\bhits\b(?! the)": "correct predictions",
    r"\bsilicon\b": "processor",
    r"\btaken? for what\b": "confusion matrix",
    r"\bhow sure, how right\b": "calibration",
    r"\bunlike (?:machines|runners)\b": "different machines",
    r"\bwritten down and repeated\b": "traced and replayed",
    r"\bby too little to rely on\b": "by too small a margin",
    r"\bwas not worth it\b": "did not pay off",
    r"\btakes? off\b": "weight decay",
    r"\bleaves? it unsure\b": "when the top-1 margin is small",
    r"\bthe way to it\b": "the connection",
    r"\bfrom nothing\b": "from scratch",
    r"\bby single views\b": "without test-time augmentation",
    r"\bto the bit\b": "bit-identical",
    r"\ball the same\b": "anyway",
    r"\banew\b": "again",
    r"\b(?:go|goes|went) on\b": "continue",
    r"\bleft aside\b": "ignored",
    r"\btaken over\b": "copied",
    r"\bbelieved\b": "trusted",
    r"\bheld (?:to|against)\b": "compared with",
    r"\b(?:that|which) (?:is|are) none\b": "say what it is",
    r"(?<!there )\bis no (?!longer|shorter|less|more|fewer)": "is not a",
    r"^Nor\b": "a whole sentence",
    r"^Such (?:is|are)\b": "an example",
    r"\bwhoever\b": "somebody who, everyone who",
    r"\bof yours\b": "your own",
    r"\bsub-folder": "subfolder",
}
"""What to avoid, as a regular expression, and what to write instead."""

_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_GENERATED = re.compile(r"^<!-- [^\n]*? -->\n(?:(?!<!-- ).)*?^<!-- end -->$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_ITEM = re.compile(r"^\s*(?:[-*+]|\d+\.)\s+|^#+\s+|^>\s*")
_SENTENCE = re.compile(r"(?<=[.!?])[\"')*]*\s+(?=[\"'(*]*[A-Z`\d])")


def iterate_sentences(text: str) -> Iterator[tuple[int, str]]:
    """Iterate over the sentences of a document in Markdown, each with the line on which its paragraph begins."""
    for pattern in (_FENCE, _GENERATED, _COMMENT):
        text = pattern.sub(lambda match: "\n" * match[0].count("\n"), text)
    paragraph: list[str] = []
    begins = 1
    for number, line in enumerate([*text.splitlines(), ""], 1):
        starts_anew = not line.strip() or _ITEM.match(line) or line.lstrip().startswith("|")
        if starts_anew and paragraph:
            yield from ((begins, sentence) for sentence in split_sentences(" ".join(paragraph)))
            paragraph = []
        if line.lstrip().startswith("|"):
            for part in re.split(r"(?<!\\)\||;", line):  # in a cell, a semicolon ends a thought
                yield from ((number, sentence) for sentence in split_sentences(part))
        elif line.strip():
            begins = begins if paragraph else number
            paragraph.append(_ITEM.sub("", line).strip())


def split_sentences(text: str) -> list[str]:
    """Split a text into sentences; code is one word, and of a link the text counts."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"``.*?``|`[^`]*`", "`code`", text)
    return [sentence.strip() for sentence in _SENTENCE.split(text) if sentence.strip()]


def count_words(sentence: str) -> int:
    """Count the words of a sentence: what holds a letter or a digit."""
    return sum(any(character.isalnum() for character in word) for word in sentence.split())


def find_faults(text: str) -> Iterator[tuple[int, str]]:
    """Find what is too long or has a plainer word, with the line of its paragraph."""
    for number, sentence in iterate_sentences(text):
        if (count := count_words(sentence)) > MAX_WORDS:
            yield number, f"{count} words, at most {MAX_WORDS}: {sentence}"
        for pattern, better in AVOID.items():
            if match := re.search(pattern, sentence, re.IGNORECASE):
                yield number, f"avoid {match[0]!r} ({better}): {sentence}"


def main(paths: list[str]) -> int:
    """Check documents and return the exit status."""
    failed = 0
    for path in paths:
        if path in UNCHECKED:
            continue
        for number, fault in find_faults(Path(path).read_text(encoding="utf-8")):
            print(f"{path}:{number}: {fault}")
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
