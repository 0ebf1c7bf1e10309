r"""Answers out of texts, by pattern. Nothing matches: None, which counts as wrong.

Of several answers the last one counts: who works a problem out states it at the end.

gsm8k             `#### 1,234`, as the data set has it, or `The answer is $1,234.`, as the examples in the prompt have it
math              `\boxed{...}`, or `final answer is ...`
mmlu, mmlu_pro    `answer is (B)`, `Answer: B`, `\boxed{B}`, or a text that begins with `(B)`, `B.`, `B:` or is a line with B alone
boolq             a text that begins with yes, no, true or false, whatever follows; else `answer is yes`, or a line with the word alone
"""

from __future__ import annotations

import re
from decimal import Decimal

_NUMBER = r"(?P<sign>-?)\s?(?:\\?\$|USD|[€£])?\s?(?P<minus>-?)(?P<number>(?:\d{1,3}(?:,\d{3})++|\d++)(?:\.\d++)?+)(?!,?\d|\s?(?:\d++\s?)?/\s?\d)"
"""A whole or decimal number with its thousands apart by commas or not, perhaps after a currency.

No fraction, no mixed number such as 3 1/2, and no other grouping such as 12,34: a part of one would be another number.
"""
_GSM8K = re.compile(rf"(?:####|\bthe answer is:?)\s*{_NUMBER}", re.IGNORECASE | re.ASCII)
_BOXED = re.compile(r"\\(?:boxed|fbox)(?:\s*(?=\{)|\s+(?P<bare>[^\s{$.]+))")
_FINAL = re.compile(r"\bfinal answer is:?[ \t]*(?P<answer>\S[^\n]*)", re.IGNORECASE)
_YES_NO = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
_WORD = r"(?P<word>yes|no|true|false)\b"


def number(text: str) -> str | None:
    """Return the number that a GSM8K solution ends in, as `normal_number` spells it."""
    matches = list(_GSM8K.finditer(text))
    if not matches:
        return None
    match = matches[-1]
    return normal_number(("-" if match["sign"] or match["minus"] else "") + match["number"])


def normal_number(text: str) -> str:
    """Spell a number in the one way that equal numbers share: 1,234.50 is 1234.5, and -0 is 0. ValueError for what is none."""
    if not re.fullmatch(r"-?\d[\d,]*(\.\d+)?", text, re.ASCII):
        raise ValueError(f"{text!r} is no number")
    value = Decimal(text.replace(",", ""))
    return format(value.normalize() if value else Decimal(0), "f")


def formula(text: str) -> str | None:
    r"""Return what the last \boxed{} holds, or what stands after the last `final answer is`, whichever comes later."""
    # A sentence around a box says what the box does, and one that is not complete says nothing.
    found = [(match.start(), answer) for match in _FINAL.finditer(text) if (answer := _sentence(match["answer"])) and "\\box" not in answer]
    found += _boxes(text)
    return max(found)[1] if found else None


def boxed(text: str) -> str | None:
    r"""Return what the last \boxed{} holds."""
    boxes = _boxes(text)
    return boxes[-1][1] if boxes else None


def _boxes(text: str) -> list[tuple[int, str]]:
    """Return where each box begins, and what it holds; without those that are empty or not closed."""
    boxes = [(match.start(), (match["bare"] or _braced(text, match.end()) or "").strip()) for match in _BOXED.finditer(text)]
    return [(start, inside) for start, inside in boxes if inside]


def _braced(text: str, start: int) -> str | None:
    """Return what is between the brace at `start` and its partner; None where it has none. Escaped braces are text."""
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[start + 1 : match.start()]
    return None


def _sentence(text: str) -> str:
    """Return a formula that ends a sentence without what is of the sentence: dollars around it, the full stop, and what follows that."""
    if match := re.match(r"\$+(?P<inside>[^$]+)\$+", text):
        return match["inside"].strip()
    return re.split(r"\.(?:\s|$)", text, maxsplit=1)[0].strip()


def letter(text: str, letters: str) -> str | None:
    """Return the letter that is given as the answer; one that is none of `letters`, as ABCD, is no answer."""
    one = f"[{re.escape(letters)}]"  # a capital, or `the answer is a number` would be A
    said = rf"(?i:\banswer(?:\s+is\s*:?|\s*:))\s*(?:\*\*)?\(?(?P<said>{one})(?![\w'’-])"
    in_box = rf"\\boxed\{{(?:\\text\{{)?\(?(?P<boxed>{one})(?!\w)"
    if matches := list(re.finditer(f"{said}|{in_box}", text)):
        return matches[-1]["said"] or matches[-1]["boxed"]
    match = re.match(rf"\s*(?:\((?P<enclosed>{one})\)|(?P<first>{one})(?:[.:)]|[ \t]*(?:\n|$)))", text)
    return (match["enclosed"] or match["first"]) if match else None


def yes_or_no(text: str) -> str | None:
    """Return yes or no; true and false are read as these."""
    if match := re.match(rf"\s*{_WORD}", text, re.IGNORECASE):
        return _YES_NO[match["word"].lower()]
    matches = list(re.finditer(rf"\banswer(?:\s+is)?\s*:?\s*{_WORD}|^[ \t]*{_WORD.replace('word', 'line')}[ \t.!]*$", text, re.IGNORECASE | re.MULTILINE))
    return _YES_NO[(matches[-1]["word"] or matches[-1]["line"]).lower()] if matches else None
