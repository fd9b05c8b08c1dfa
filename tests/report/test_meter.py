"""Progress in words: the step, bytes, rate and time left, by a clock that the test moves."""

import pytest

from llamaconv.report.meter import Meter, duration


def test_words_and_share_follow_both_steps() -> None:
    now = 0.0
    meter = Meter(("write", "verify"), clock=lambda: now)
    assert meter.words == "starting" and meter.share == 0
    meter("write", 0, 4_000_000_000)
    now = 2.0
    meter("write", 1_000_000_000, 4_000_000_000)
    assert meter.words == "1 of 2, writing: 1 GB of 4 GB, 500 MB/s, 6 s left"
    assert meter.share == 0.125
    meter("write", 500_000_000, 4_000_000_000)
    assert "1 GB of 4 GB" in meter.words, "a slower thread does not go back"
    now = 3.0
    meter("verify", 0, 8_000_000_000)
    assert meter.words == "2 of 2, verifying: 0 B of 8 GB" and meter.share == 0.5
    meter("verify", 8_000_000_000, 8_000_000_000)
    assert meter.words == "2 of 2, verifying: 8 GB of 8 GB, finishing" and meter.share == 1


def test_rate_is_that_of_the_last_seconds() -> None:
    """What an interrupted run has left is read quickly, and says nothing about the rest."""
    now = 0.0
    meter = Meter(("write",), clock=lambda: now)
    meter("write", 0, 1000)
    now = 1.0
    meter("write", 500, 1000)
    for _ in range(20):
        now += 1
        meter("write", round(499 + now), 1000)
    assert meter.words == "writing: 520 B of 1 kB, 1 B/s, 8 min left"


@pytest.mark.parametrize(
    ("seconds", "words"), [(14.2, "14 s"), (99, "99 s"), (180, "3 min"), (7500, "2 h 5 min")]
)
def test_time_left_has_a_unit_of_its_size(seconds: float, words: str) -> None:
    assert duration(seconds) == words
