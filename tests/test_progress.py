"""Where stderr is no terminal, a progress bar is a plain line now and then."""

import re
import time

import pytest

import plumbing.run
from plumbing.run import Progress

# What is being done, how far it is, how long it has taken, and how long it will take.
LINE = re.compile(r"roll-outs: (\d+) of 40 episodes after 00:0\d, 00:0\d to go")


@pytest.fixture
def heartbeat(monkeypatch):
    """Makes the seconds between two lines few."""

    def beat(seconds: float) -> None:
        monkeypatch.setattr(plumbing.run, "HEARTBEAT", seconds)

    return beat


def test_a_line_per_heartbeat_says_what_how_far_and_how_long_to_go(heartbeat, capsys):
    heartbeat(0.3)
    begin = time.time()
    progress = Progress(total=40, desc="roll-outs", unit="episode")
    for _ in range(40):
        time.sleep(0.03)
        progress.update()
    progress.close()
    seconds = time.time() - begin
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == "" and 2 <= len(lines) <= seconds / 0.3
    counts = [int(LINE.fullmatch(line)[1]) for line in lines]
    assert counts == sorted(set(counts)) and 0 < counts[0] and counts[-1] <= 40


def test_the_time_to_go_is_that_of_the_steps_made_here(heartbeat, capsys):
    """A resumed run has not made the first 30 of its steps in this process."""
    heartbeat(0.5)
    progress = Progress(total=40, initial=30, desc="sft", unit="update")
    progress.start_t -= 100
    progress.update(5)
    time.sleep(0.7)
    progress.update(0)
    progress.close()
    # 5 updates have taken 100.5 s or a little more, and 5 are left.
    line = r"sft: 35 of 40 updates after 01:4\d, 01:4\d to go\n"
    assert re.fullmatch(line, capsys.readouterr().err)


def test_a_line_comes_also_where_one_step_takes_long(heartbeat, capsys):
    """Nobody calls `update`. Before the first step is done, the time to go is not known."""
    heartbeat(0.5)
    progress = Progress(total=40, desc="roll-outs", unit="episode")
    time.sleep(2.6)
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 6
    assert all(re.fullmatch(r"roll-outs: 0 of 40 episodes after 00:0\d", line) for line in lines)


def test_a_loop_shorter_than_a_heartbeat_prints_nothing(heartbeat, capsys):
    heartbeat(20)
    assert list(Progress(range(100), desc="separator", unit="roll-out")) == list(range(100))
    progress = Progress(total=40, desc="roll-outs", unit="episode")
    progress.update(40)
    progress.close()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("how", ["rank", "disable"])
def test_a_process_that_shall_be_silent_prints_nothing(how, heartbeat, capsys, monkeypatch):
    """In a job all processes but rank 0 are silent."""
    heartbeat(0.1)
    if how == "rank":
        monkeypatch.setattr(plumbing.run.parallel, "rank", lambda: 1)
    bar = {"total": 40, "desc": "roll-outs", "unit": "episode", "disable": how == "disable"}
    progress = Progress(**bar)
    for _ in range(4):
        time.sleep(0.15)
        progress.update()
    progress.close()
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_it_is_a_bar(heartbeat, capsys, monkeypatch):
    monkeypatch.setattr(plumbing.run.sys.stderr, "isatty", lambda: True)
    progress = Progress(total=40, desc="roll-outs", unit="episode")
    progress.update(40)
    progress.close()
    err = capsys.readouterr().err
    assert "roll-outs: 100%" in err and "\r" in err and "40/40" in err


def test_the_first_line_comes_early(monkeypatch, capsys):
    monkeypatch.setattr(plumbing.run, "FIRST_LINE", 0.3)
    progress = Progress(total=40, desc="roll-outs", unit="episode")
    progress.update(30)
    time.sleep(0.9)
    progress.close()
    (line,) = capsys.readouterr().err.splitlines()
    assert LINE.fullmatch(line)
