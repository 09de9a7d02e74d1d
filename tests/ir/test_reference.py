"""The page on the IR is what the declarations say."""

from __future__ import annotations

from pathlib import Path

import pytest

from planc.ir.reference import page

PAGE = Path(__file__).resolve().parents[2] / "docs/ir.md"


def test_the_page_on_the_ir_is_current() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page(text) == text, "run: python -m planc.ir.reference docs/ir.md"


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="markers"):
        page("# The IR\n")
