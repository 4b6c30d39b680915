"""What a long run shows besides its bars."""

import pytest

from sliderquant.cli.progress import Lines, in_words
from sliderquant.progress import WindowReport


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(42.4, "about 42 s"), (99.9, "about 100 s"), (754, "about 13 minutes"), (9000, "about 2.5 hours")],
)
def test_times_have_the_unit_that_suits_them(seconds, words):
    assert in_words(seconds) == words


def test_after_the_first_window_a_run_says_what_is_left(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr("sliderquant.cli.progress.time.monotonic", lambda: clock[0])
    lines = Lines(verbose=False)
    lines.run_started(steps=40, work=50.0)
    for _ in range(2):
        lines.window_started("[0..1]", 1, 4)
        clock[0] += 20
        lines.epoch_done(10, 10.0, 0.5)
        lines.window_done(WindowReport([0, 1], "middle", 0, 1.0, losses=[0.5]))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("refining takes")]
    assert said == ["refining takes about 80 s more, by the time of the first window"]
