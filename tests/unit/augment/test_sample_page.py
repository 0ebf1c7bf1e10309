from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

pytest.importorskip("jinja2")

from hypothesis import given
from hypothesis import strategies as st

from tpt_megatron.augment.outcome import Outcome, Rejection
from tpt_megatron.augment.sample_page import render_sample, segments
from tpt_megatron.records import AugmentedDocument, Document, Thought


class Texts(HTMLParser):
    """The text of every element whose class begins with `text`, as a browser's reader sees it; text of summaries left out."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.depth = 0
        self.in_summary = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if self.depth:
            self.depth += 1
        elif tag == "div" and (dict(attributes).get("class") or "").startswith("text"):
            self.depth = 1
            self.found.append("")
        self.in_summary = tag == "summary"

    def handle_endtag(self, tag: str) -> None:
        self.in_summary = False
        self.depth -= self.depth > 0

    def handle_data(self, data: str) -> None:
        if self.depth and not self.in_summary:
            self.found[-1] += data


def texts(html: str) -> list[str]:
    parser = Texts()
    parser.feed(html)
    return parser.found


def pair(document: str, *thoughts: Thought, rejections: tuple[Rejection, ...] = (), source: str | None = "web") -> tuple[AugmentedDocument, Outcome]:
    return AugmentedDocument(Document("d-1", document, source), thoughts), Outcome(thoughts, rejections)


def page(*pairs: tuple[AugmentedDocument, Outcome]) -> str:
    return render_sample(list(pairs), title="Sample", settings={"model": "m"})


def test_texts_stand_on_the_page_exactly() -> None:
    document = "\n  if a < b && c:\n\t<b>'quoted \"text\"'</b>\n\n</div>" + "long " * 600
    thought = "\n<think> & &amp; {{ x }} {% y %}\n   indented"
    assert texts(page(pair(document, Thought(thought, "g", seen_start=3, seen_end=20)))) == [document, thought]


def test_carriage_returns_and_nul_are_shown_as_signs_and_explained() -> None:
    html = page(pair("a\r\nb\rc\0", Thought("t", "g")))
    assert texts(html)[0] == "a↵\nb↵\nc�"
    assert "A carriage return is shown as" in html
    assert "A carriage return is shown as" not in page(pair("a\nb"))


def test_what_was_not_seen_is_grey_and_folds_when_long() -> None:
    html = page(pair("abcdef", Thought("t", "g", seen_start=0, seen_end=4)))
    assert '<span class="unseen">ef</span>' in html
    assert "saw characters 0 to 4" in html
    html = page(pair("x" * 1000, Thought("t", "g", seen_start=100, seen_end=500)))
    assert "500 characters that no thought has seen" in html
    assert f'<span class="unseen">{"x" * 100}</span>' in html
    assert 'class="unseen"' not in page(pair("abcdef", Thought("t", "g")))
    assert 'class="unseen"' not in page(pair("abcdef", rejections=(Rejection("request_failed", "", Thought("", "g")),)))


def test_different_views_are_marked() -> None:
    html = page(pair("abcdef", Thought("t", "g", seen_start=0, seen_end=4), Thought("t", "g", seen_start=2, seen_end=6)))
    assert re.findall(r'data-mark="([^"]+)">(\w+)<', html) == [("seen by 1", "ab"), ("seen by 1, 2", "cd"), ("seen by 2", "ef")]
    assert "data-mark=" not in page(pair("abcdef", Thought("t", "g", seen_start=0, seen_end=4), Thought("t", "g", seen_start=0, seen_end=4)))


def test_thoughts_say_what_made_them_and_why_they_were_rejected() -> None:
    kept = Thought("good", "qwen", prompt="expert", sample=0, tokens=1234, finish_reason="stop")
    bad = Rejection("loop", "61 % <repeated>", Thought("bad", "qwen"))
    nothing = Rejection("request_failed", "400", Thought("", "qwen"))
    html = page(pair("text", kept, rejections=(bad, nothing)))
    assert re.search(r"1\. qwen</b> · prompt expert · sample 0 · 1,234 tokens · finish reason stop</p>", html)
    assert re.search(r"2\. qwen</b> · 3 characters</p>", html)
    assert "3. qwen</b></p>" in html
    assert html.count('class="thought rejected"') == 2
    assert "rejected: loop</b> – 61 % &lt;repeated&gt;" in html
    assert "No text." in html
    assert "1 document, 1 thought kept, 2 rejected" in html


def test_long_texts_fold_and_short_ones_do_not() -> None:
    assert page(pair("x" * 1800, Thought("t", "g"))).count('type="checkbox"') == 0
    html = page(pair("x" * 1801, Thought("y" * 5000, "g")))
    assert html.count('type="checkbox"') == 2
    assert "Show all 5,000 characters" in html
    ids = re.findall(r'<input type="checkbox" class="fold" id="(\w+-?\w*)"', html)
    assert ids == re.findall(r'<label for="(\w+-?\w*)"', html)
    assert len(set(ids)) == 2


def test_page_stands_alone_and_empty_cases_read_well() -> None:
    html = page(pair("text <script>", source="<i>"))
    assert "No thought about this document." in html
    assert "no source" in page(pair("text", source=None))
    assert "&lt;i&gt;" in html
    assert not re.search(r"<(script|link|img)\b", html)
    assert html.startswith("<!doctype html>")
    assert "holds no document" in page()


@given(st.text(max_size=30), st.lists(st.tuples(st.none() | st.integers(0, 40), st.none() | st.integers(0, 40)), max_size=4))
def test_segments_joined_are_the_text_and_know_who_saw_each_character(text: str, views: list[tuple[int | None, int | None]]) -> None:
    pieces = segments(text, [Thought("t", "g", seen_start=start, seen_end=end) for start, end in views])
    assert "".join(piece.text for piece in pieces) == text
    at = 0
    for piece in pieces:
        for position in range(at, at + len(piece.text)):
            seen_by = tuple(n for n, (start, end) in enumerate(views, 1) if (start or 0) <= position < (len(text) if end is None else end))
            assert piece.seen_by == seen_by
        at += len(piece.text)
