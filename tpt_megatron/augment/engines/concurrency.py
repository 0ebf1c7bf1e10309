"""How many requests one server gets at once: as many as bring throughput, fewer when it says that it is too many.

Additive increase, multiplicative decrease (Chiu and Jain 1989) with the slow start and threshold of TCP (RFC 5681), steered by
throughput as well as by refusals, since inference servers queue what they cannot do and refuse nothing:

    measure   throughput over one round trip: as many replies as the limit, the first of them sent after the limit last changed
    grow      double (below the threshold) or add a quarter (above it; more after every success), and keep that if throughput grew
    hold      when it did not: back to the limit before, and a longer rest before the next trial
    back off  x0.7 when a fifth of the latest requests was too much, once for all that were sent before the last back-off; a few
              refusals cost next to nothing, and gateways give some at any load

Nothing here reads a clock: every call that needs the time is given it, in seconds of any monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass

from tpt_megatron.config.augment import Concurrency

_BACK_OFF = 0.7
_BEARABLE_OVERLOADS = 0.2
_LATEST = 32  # requests, over which that share is smoothed
_GENTLEST, _BOLDEST = 0.25, 1.0
# Of the growth of the limit, the share by which throughput must have grown: doubling the limit must bring 20 % more.
_WORTHWHILE = 0.2
# A window is no shorter, so that replies of milliseconds are measured over many of them; and holds no fewer replies.
_WINDOW_S = 0.25
_WINDOW_REPLIES = 8
# Windows without a trial: after an overload; and at most, since a trial that brings nothing doubles it.
_REST_AFTER_OVERLOAD = 4
_LONGEST_REST = 16


@dataclass(frozen=True, slots=True)
class Throughput:
    """Of one window. `tokens_per_s` is None where a reply did not tell its tokens."""

    replies_per_s: float
    tokens_per_s: float | None

    def over(self, other: Throughput) -> float:
        """Return this as a multiple of `other`: in tokens where both know them, else in replies."""
        if self.tokens_per_s is not None and other.tokens_per_s:
            return self.tokens_per_s / other.tokens_per_s
        return self.replies_per_s / other.replies_per_s

    def mixed_with(self, other: Throughput) -> Throughput:
        """Return the mean of both."""
        tokens = None if self.tokens_per_s is None or other.tokens_per_s is None else (self.tokens_per_s + other.tokens_per_s) / 2
        return Throughput((self.replies_per_s + other.replies_per_s) / 2, tokens)


class AdaptiveLimit:
    """The limit of one server: at least 1, at most `Concurrency.maximum`, `Concurrency.initial` at first.

    `limit` says how many requests may be under way, `under_way` how many are. The caller takes a place with `acquire` before
    it sends, gives it back with `release` whatever happened, and reports `replied` or `overloaded` before that.
    """

    def __init__(self, concurrency: Concurrency) -> None:
        self.limit = concurrency.initial
        self.under_way = 0
        self._maximum = concurrency.maximum
        self._accepted = concurrency.initial  # the limit that holds; a larger `limit` is on trial
        self._reference: Throughput | None = None  # at the accepted limit
        self._threshold = concurrency.maximum  # below it a trial doubles
        self._step = _GENTLEST  # of a trial above the threshold, as a share of the limit
        self._rest, self._rest_left = 1, 0  # windows between trials
        self._changed = self._backed_off = float("-inf")
        self._overloads = 0.0  # share among the latest requests
        self._recovering = False  # backed off, and no whole window since
        self._start: float | None = None  # of the window; None: no reply yet to a request sent since the limit changed
        self._replies = self._tokens = 0
        self._all_tell_tokens = True
        self._was_reached = False

    @property
    def room(self) -> int:
        """How many more requests may be sent; negative after a back-off."""
        return self.limit - self.under_way

    def acquire(self) -> None:
        """Count one request more under way."""
        self.under_way += 1
        if self.under_way >= self.limit:
            self._was_reached = True

    def release(self) -> None:
        """Count one request fewer under way."""
        self.under_way -= 1

    def replied(self, sent: float, now: float, tokens: int | None) -> None:
        """Take in a good reply to a request sent at `sent`. `tokens` were generated; None where the reply does not tell."""
        self._overloads -= self._overloads / _LATEST
        if self._start is None:
            if sent >= self._changed:
                self._start = now
            return
        self._replies += 1
        if tokens is None:
            self._all_tell_tokens = False
        else:
            self._tokens += tokens
        if self._replies >= self.limit and self._replies >= _WINDOW_REPLIES and now - self._start >= _WINDOW_S:
            self._end_window(now)

    def overloaded(self, sent: float, now: float) -> None:
        """Take in that a request sent at `sent` was too much: 429, 503, or no reply in time."""
        if sent < self._backed_off:
            return
        self._overloads += (1 - self._overloads) / _LATEST
        if self._overloads < _BEARABLE_OVERLOADS:
            return
        self._overloads = 0.0
        if not self._recovering:
            self._threshold = max(1, int(self.limit * _BACK_OFF))
        self._recovering = True
        self._backed_off = now
        self._accepted = max(1, int(self.limit * _BACK_OFF))
        self._reference = None
        self._step = _GENTLEST
        self._rest, self._rest_left = 1, _REST_AFTER_OVERLOAD
        self._change(self._accepted, now)

    def _end_window(self, now: float) -> None:
        assert self._start is not None
        elapsed = now - self._start
        seen = Throughput(self._replies / elapsed, self._tokens / elapsed if self._all_tell_tokens else None)
        was_reached = self._was_reached
        self._new_window(now)
        self._recovering = False
        if not was_reached:
            return  # fewer requests than the limit: their throughput says nothing about it
        if self.limit > self._accepted:
            self._judge(seen, now)
        else:
            self._reference = seen if self._reference is None else seen.mixed_with(self._reference)
            self._rest_left -= 1
        if self.limit == self._accepted and (self._rest_left <= 0 or self._accepted < self._threshold):
            self._try_more(now)

    def _judge(self, seen: Throughput, now: float) -> None:
        """Keep the limit on trial if it brought throughput, else return to the one before."""
        assert self._reference is not None
        wanted = 1 + _WORTHWHILE * (self.limit / self._accepted - 1)
        if seen.over(self._reference) >= wanted:
            self._accepted, self._reference = self.limit, seen
            self._step = min(2 * self._step, _BOLDEST)
            self._rest, self._rest_left = 1, 0
        else:
            self._threshold = min(self._threshold, self._accepted)
            self._step = _GENTLEST
            self._rest = self._rest_left = min(2 * self._rest, _LONGEST_REST)
            self._change(self._accepted, now)

    def _try_more(self, now: float) -> None:
        accepted = self._accepted
        wanted = min(2 * accepted, self._threshold) if accepted < self._threshold else accepted + max(1, int(accepted * self._step))
        if (wanted := min(wanted, self._maximum)) > self.limit:
            self._change(wanted, now)

    def _change(self, limit: int, now: float) -> None:
        self.limit = limit
        self._changed = now
        self._new_window(None)

    def _new_window(self, start: float | None) -> None:
        self._start = start
        self._replies = self._tokens = 0
        self._all_tell_tokens = True
        self._was_reached = self.under_way >= self.limit
