"""Minutes on known GPUs: counted, nothing is run."""

from benchmarks.speed import minutes
from sliderquant.planning.methods import METHODS


def test_every_effort_has_minutes_on_every_gpu(parsed, capsys):
    minutes.run(parsed(minutes, "--shapes", "tiny", "--seqlen", 64))
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| tiny")]
    assert [row[1] for row in rows] == list(METHODS["sliderquant"].efforts)
    assert lines[2].count("|") == len(minutes.GPUS) + 4


def test_a_billion_weights_take_less_than_an_hour_at_the_default_effort():
    plan = minutes.plan_of("llama-3.2-1b", "default", 128, 2048)
    assert minutes.minutes(plan, "RTX 4090") < 60
    assert minutes.minutes(plan, "H100 SXM") < minutes.minutes(plan, "RTX 4090")
