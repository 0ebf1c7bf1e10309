"""Claims between workers, some of them on other machines."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tpt_megatron.augment.claims import Claims, Owner
from tpt_megatron.storage import locate


def elsewhere(worker: str) -> Owner:
    return Owner(worker, host=f"host-{worker}", machine=f"machine-{worker}", process=1, started=0.0)


def claims(folder: Path, worker: str, timeout_s: float = 60) -> Claims:
    made = Claims(locate(folder), timeout_s, elsewhere(worker))
    made.look()
    return made


def test_the_first_gets_it_and_the_second_sees_who(tmp_path: Path) -> None:
    a, b = claims(tmp_path, "a"), claims(tmp_path, "b")
    assert a.take(3) is not None
    assert b.take(3) is None, "b looked before a took it, and must lose all the same"
    b.look()
    assert b.take(3) is None
    assert b.holder(3) == "host-a:1"
    assert b.holder(4) is None


def test_what_is_released_can_be_taken_at_once_by_one(tmp_path: Path) -> None:
    a = claims(tmp_path, "a")
    held = a.take(0)
    assert held is not None
    a.release(held)
    b, c = claims(tmp_path, "b"), claims(tmp_path, "c")
    assert b.take(0) is not None
    assert c.take(0) is None


def test_a_silent_holder_is_taken_over_after_the_time_out_and_notices(tmp_path: Path) -> None:
    a = claims(tmp_path, "a", timeout_s=0.3)
    held = a.take(0)
    assert held is not None
    b = claims(tmp_path, "b", timeout_s=0.3)
    for _ in range(3):
        assert b.take(0) is None
        assert a.renew(held)
        time.sleep(0.2)
        b.look()
    assert b.is_alive(0)
    time.sleep(0.4)
    b.look()
    assert b.take(0) is None, "it moved since the last look"
    time.sleep(0.4)
    assert not b.is_alive(0)
    taken = b.take(0)
    assert taken is not None
    assert taken.generation == 1
    assert not a.renew(held)
    assert b.renew(taken)


def test_a_holder_on_this_machine_that_is_gone_is_taken_over_at_once(tmp_path: Path) -> None:
    script = "import sys; from tpt_megatron.augment.claims import Claims; from tpt_megatron.storage import locate\n"
    script += "claims = Claims(locate(sys.argv[1]), 60); claims.look(); assert claims.take(0); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        here = Claims(locate(tmp_path), 60)
        here.look()
        assert here.take(0) is None
        assert here.is_alive(0)
        process.kill()
    assert here.take(0) is not None


def test_a_process_of_the_same_number_that_started_later_is_another(tmp_path: Path) -> None:
    here = Owner.here()
    assert not here.is_gone()
    assert Owner("x", here.host, here.machine, os.getpid(), here.started - 100).is_gone()
    assert not Owner("x", here.host, "another machine", 2**22, 0.0).is_gone()


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"worker": "a"'])
def test_a_claim_that_cannot_be_read_is_taken_over_after_the_time_out(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "00000.000.json").write_bytes(content)
    b = claims(tmp_path, "b", timeout_s=0.2)
    assert b.take(0) is None
    time.sleep(0.3)
    assert b.take(0) is not None


def test_a_finished_shards_claims_are_forgotten_and_no_others(tmp_path: Path) -> None:
    a = claims(tmp_path, "a")
    assert a.take(1) is not None
    assert a.take(11) is not None
    a.forget(1)
    assert locate(tmp_path).names() == ["00011.000.json"]
