"""Nobody who says nothing, and no rank that reads nothing, holds up the leader."""

import socket
import threading

import pytest

from saw_trtllm.errors import RankError
from saw_trtllm.parallel import channel


@pytest.fixture
def leader():
    leader = channel.LeaderChannel(1)
    yield leader
    leader.close()


def come(leader):
    """A rank that has come in."""
    ranks = []
    thread = threading.Thread(target=lambda: ranks.append(channel.RankChannel(leader.address, 0)))
    thread.start()
    while not leader.accept(1.0):
        pass
    thread.join()
    return ranks[0]


def test_a_stranger_who_says_nothing_does_not_hold_up_the_start(leader, monkeypatch):
    monkeypatch.setattr(channel, "_ARRIVAL_TIME", 0.1)
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(leader.address.endpoint)
        rank = come(leader)
    steps = leader.begin(5.0)
    assert len(steps) == 1
    leader.send("close")
    assert rank.receive().command == "close"


def test_a_rank_that_reads_nothing_is_lost_and_does_not_hang_the_leader(leader):
    rank = come(leader)
    leader.begin(0.1)
    with pytest.raises(RankError, match="the process of rank 0 has ended or hangs"):
        leader.send("launch", bytes(1 << 24))
    rank.close()
