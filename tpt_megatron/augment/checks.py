"""What is done before a thought is believed: each check has a name, under which rejections are counted.

Loops and copies are found by runs of words. Where white space does not set words apart (Chinese, Thai, "aaaa..."), runs
of characters take their place, 3 for a word.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from tpt_megatron.augment.contamination import ContaminationIndex, Hashes, run_hashes
from tpt_megatron.config.augment import Checks
from tpt_megatron.errors import ConfigError, MachineError

REASONS = ("refused", "empty", "loop", "unclosed", "delimiter", "copy", "contaminated", "language")
"""Names of the checks, the most telling first: a thought that fails several is counted under the first."""

LOOP_WORDS = 8
COPY_WORDS = 13
CHARACTERS_PER_WORD = 3
REFUSAL_CHARACTERS = 300

_SPACELESS_WORD_CHARACTERS = 16  # mean length of "words" from which they are none; code has about 10, German 7
_FEWEST_LOOP_RUNS = 40  # "1 + 1 + 1 + 1 + 1 + 1 = 6" is no loop
_SHORTEST_TAIL, _LONG_TAIL = 300, 2000  # characters
_TAIL_SHARE, _TAIL_REPEATS = 0.3, 4
_PROBE_CHARACTERS, _PROBES = 100, 8

_FEWEST_LETTERS = 200
_SURE = 0.9
_PROSE_SHARE = 0.88  # of what is not white space: letters and signs that are not ASCII; English prose has 0.94, most code less than 0.8
_LANGUAGE_CHARACTERS = 4000
_NO_LANGUAGE = "zxx"  # the identifier's label for what is in none


class ThoughtChecks:
    """Judges thoughts as `config` says. `contamination` is the index of `config.contamination`, which is slow to build.

    Raises ConfigError for a refusal pattern that is no regular expression or a language that cannot be told, MachineError
    when `config.language` is set and py3langid is not installed.
    """

    def __init__(self, config: Checks, contamination: ContaminationIndex | None) -> None:
        self._config = config
        self._contamination = contamination
        self._refusals = [_compiled(pattern) for pattern in config.refusals]
        self._language = None if config.language is None else LanguageCheck(config.language)

    def check(self, thought_text: str, document_text: str, closed: bool, refused: bool) -> tuple[str, str] | None:
        """Return (one of REASONS, what was found, for a person), or None for a good thought.

        closed   the model ended the thought by itself;  refused   the engine says that the model, or its server, refused
        """
        config = self._config
        if refused:
            return "refused", "the engine reports a refusal"
        if (said := self._refusal(thought_text)) is not None:
            return "refused", f"says {said!r}"
        if (length := len(thought_text.strip())) < config.min_characters:
            return "empty", f"{length} characters, fewer than min_characters={config.min_characters}"
        words = thought_text.split()
        units = units_of(words)
        if config.max_repeated is not None and (loop := find_loop(thought_text, units, config.max_repeated)) is not None:
            return "loop", loop
        if not closed and config.unclosed != "keep":
            return "unclosed", f"cut off after {len(thought_text):,} characters"
        for delimiter in config.delimiters:
            if delimiter in thought_text:
                return "delimiter", f"contains {delimiter!r}"
        if config.max_copied is not None and (copied := find_copy(words, units, document_text, config.max_copied)) is not None:
            return "copy", copied
        if self._contamination is not None and (evidence := self._contamination.find(thought_text)) is not None:
            return "contaminated", f"an evaluation set has {evidence!r}"
        if self._language is not None and (foreign := self._language.find(thought_text, document_text)) is not None:
            return "language", foreign
        return None

    def _refusal(self, text: str) -> str | None:
        start = text[:REFUSAL_CHARACTERS].replace("\u2019", "'")
        return next((found.group() for pattern in self._refusals if (found := pattern.search(start))), None)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise ConfigError(f"checks.refusals: {pattern!r} is no regular expression: {error}") from None


@dataclass(frozen=True, slots=True)
class Units:
    """What runs of a text are made of: `hashes` [n] of its words or its characters (white space apart), `per_word` to a word."""

    hashes: Hashes
    kind: Literal["word", "character"]
    per_word: int


def units_of(words: list[str], kind: Literal["word", "character"] | None = None) -> Units:
    """Return the units of a text that was split into `words`: words, unless these are so long that they cannot be any."""
    if kind is None:
        kind = "word" if sum(map(len, words)) < _SPACELESS_WORD_CHARACTERS * len(words) else "character"
    if kind == "word":
        # Python's own hash differs from process to process, but not which of these are equal, which is all that counts.
        return Units(np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64), kind, 1)
    return Units(_codes("".join(words)).astype(np.uint64), kind, CHARACTERS_PER_WORD)


def _codes(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def find_loop(text: str, units: Units, max_repeated: float) -> str | None:
    """Say how a text loops: too many of its runs of 8 words repeat earlier ones, or its end repeats one unit."""
    length = LOOP_WORDS * units.per_word
    runs = run_hashes(units.hashes, length)
    if len(runs) >= _FEWEST_LOOP_RUNS * units.per_word and (share := 1 - _distinct(runs) / len(runs)) > max_repeated:
        return f"{_percent(share)} of its {length}-{units.kind} runs repeat earlier ones"
    tail = looping_tail(text)
    if tail is not None:
        characters, period = tail
        unit = text.rstrip()[-period:]
        shown = unit if len(unit) <= 60 else f"{unit[:57]}..."
        return f"its last {characters:,} characters repeat {shown!r} {characters // period} times"
    return None


def _distinct(runs: Hashes) -> int:
    ordered = np.sort(runs)
    return 1 + int(np.count_nonzero(ordered[1:] != ordered[:-1]))


def looping_tail(text: str) -> tuple[int, int] | None:
    """Return (characters, period) of the part at a text's end that is one unit over and over, None where there is none.

    It counts when it has 300 characters and 4 repetitions or more, and is 30 % of the text or 2,000 characters.
    """
    text = text.rstrip()
    end = len(text) - _PROBE_CHARACTERS
    if len(text) < _SHORTEST_TAIL:
        return None
    probe, found, codes = text[end:], end, None
    # Where a unit repeats, the text's last characters stand one period earlier too.
    for _ in range(_PROBES):
        found = text.rfind(probe, 0, found + _PROBE_CHARACTERS - 1)
        if found < 0:
            return None
        period = end - found
        if codes is None:
            codes = _codes(text)
        differ = np.flatnonzero(codes[:-period] != codes[period:])
        characters = len(text) - (int(differ[-1]) + 1 if len(differ) else 0)
        if characters >= max(_SHORTEST_TAIL, _TAIL_REPEATS * period, min(_TAIL_SHARE * len(text), _LONG_TAIL)):
            return characters, period
    return None


def find_copy(words: list[str], units: Units, document: str, max_copied: float) -> str | None:
    """Say that a text is a copy: too many of its runs of 13 words stand in the document.

    A text of 8 to 12 words is a copy when it stands in the document as a whole; a shorter one never is.
    """
    length = COPY_WORDS * units.per_word
    count = len(units.hashes)
    if count < length:
        if count < LOOP_WORDS * units.per_word:
            return None
        gap = " " if units.kind == "word" else ""
        whole = f"{gap}{gap.join(words)}{gap}" in f"{gap}{gap.join(document.split())}{gap}"
        return f"all of its {count} {units.kind}s stand in the document, in this order" if whole else None
    shown = np.sort(run_hashes(units_of(document.split(), units.kind).hashes, length))
    if not len(shown):
        return None
    runs = run_hashes(units.hashes, length)
    copied = np.count_nonzero(shown.take(np.searchsorted(shown, runs), mode="clip") == runs)
    share = int(copied) / len(runs)
    return f"{_percent(share)} of its {length}-{units.kind} runs stand in the document" if share > max_copied else None


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


class LanguageCheck:
    """Compares a text's language with `wanted`, a code, or with the document's, under `same`.

    Only a sure finding counts: at least 200 letters of what is not code or formulas, and a probability of 0.9. The
    language is that of the first 4,000 characters. Raises ConfigError for an unknown code, MachineError without py3langid.
    """

    def __init__(self, wanted: str) -> None:
        try:
            from py3langid.langid import MODEL_FILE, LanguageIdentifier
        except ImportError:
            raise MachineError("checks.language needs py3langid: install tpt-megatron[generate], or set checks.language=null") from None
        self._identifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        known = sorted(set(self._identifier.labels) - {_NO_LANGUAGE})
        if wanted != "same" and wanted not in known:
            raise ConfigError(f"checks.language={wanted!r} is unknown; give null, same, or one of {', '.join(known)}")
        self._wanted = wanted

    def find(self, text: str, document: str) -> str | None:
        """Say which language a text is in, when it surely is another than the one that is wanted."""
        found = self.language_of(text)
        if found is None or found == self._wanted:
            return None
        if self._wanted != "same":
            return f"in {found!r}, not {self._wanted!r}"
        expected = self.language_of(document)
        return None if expected in (None, found) else f"in {found!r}, its document in {expected!r}"

    def language_of(self, text: str) -> str | None:
        """Return the code of a text's language; None when that is not sure."""
        text = text[:_LANGUAGE_CHARACTERS]
        if not is_prose(text):
            return None
        code, probability = self._identifier.classify(text)
        return str(code) if probability >= _SURE and code != _NO_LANGUAGE else None


def is_prose(text: str) -> bool:
    """Say whether a text is long enough and has few enough digits, signs and punctuation to be in a natural language."""
    letters = sum(map(str.isalpha, text))
    signs = sum(1 for character in text if character.isascii() and not character.isalpha() and not character.isspace())
    solid = sum(map(len, text.split()))
    return letters >= _FEWEST_LETTERS and signs <= (1 - _PROSE_SHARE) * solid
