"""Write the server's description: python -m tests.openapi."""

from __future__ import annotations

import json

from tests.batching import build_app
from tests.conftest import PROJECT

if __name__ == "__main__":
    text = json.dumps(build_app().describe(), indent=2, ensure_ascii=False) + "\n"
    (PROJECT / "docs" / "openapi.json").write_text(text, encoding="utf-8")
