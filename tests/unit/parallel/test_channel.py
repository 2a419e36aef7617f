"""Nobody who says nothing, and no rank that reads nothing, holds up the leader."""

import contextlib
import socket
import threading

import pytest

from saw_trtllm.errors import RankError
from saw_trtllm.parallel import channel
from saw_trtllm.runtime import door


@pytest.fixture
def leader():
    leader = channel.LeaderChannel(1)
    yield leader
    leader.close()


def come(leader):
    """A rank that has come in."""
    ranks = []
    thread = threading.Thread(target=lambda: ranks.append(channel.RankChannel(leader.address, 0, 1)))
    thread.start()
    while not leader.accept(1.0):
        pass
    thread.join()
    return ranks[0]


def test_a_stranger_who_says_nothing_does_not_hold_up_the_start(leader, monkeypatch):
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(leader.address.endpoint)
        with monkeypatch.context() as patched:
            patched.setattr(door, "PATIENCE", 0.1)  # of the stranger, who is the first to be let in
            assert not leader.accept(60.0)
        rank = come(leader)
    steps = leader.begin(60.0)
    assert len(steps) == 1
    leader.send("close")
    assert rank.receive().command == "close"


def test_a_stranger_who_says_a_byte_now_and_then_does_not_hold_up_the_start(leader, monkeypatch):
    """Each would be in time, and all 41 that a rank says of itself take seconds."""
    monkeypatch.setattr(door, "PATIENCE", 0.2)
    said, turned_away = [], threading.Event()

    def drip(stranger):
        with contextlib.suppress(OSError):
            while not turned_away.wait(0.15):
                stranger.sendall(b"x")
                said.append(True)

    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(leader.address.endpoint)
        thread = threading.Thread(target=drip, args=(stranger,))
        thread.start()
        assert not leader.accept(60.0)
        turned_away.set()
        thread.join()
    assert len(said) < 41


def test_messages_and_answers_arrive_whole_and_in_their_order(leader):
    rank = come(leader)
    leader.begin(60.0)
    bodies = [b"", bytes(range(256)), bytes(1 << 20)]
    sender = threading.Thread(target=lambda: [leader.send("launch", body) for body in bodies])
    sender.start()
    for number, body in enumerate(bodies, start=1):
        assert rank.receive() == (number, "launch", body)
        rank.say(("answer", number))
    sender.join()
    answers = []
    while len(answers) < 3:
        answers += leader.receive(60.0)
    assert answers == [(0, number, ("answer", number)) for number in (1, 2, 3)]


def test_a_rank_that_reads_nothing_is_lost_and_does_not_hang_the_leader(leader):
    rank = come(leader)
    leader.begin(0.1)
    with pytest.raises(RankError, match="the process of rank 0 has ended or hangs"):
        leader.send("launch", bytes(1 << 24))
    del rank


def test_a_rank_that_stops_within_an_answer_is_lost_and_does_not_hang_the_leader(leader):
    rank = come(leader)
    leader.begin(0.1)
    rank._steps.sendall(channel._packed(1, 0, bytes(100))[:50])
    with pytest.raises(RankError, match="the process of rank 0 has ended or hangs"):
        leader.receive(60.0)


def test_a_message_may_have_more_than_four_gib():
    class Huge(bytes):
        def __len__(self):
            return 5 << 30

    assert channel._HEAD.unpack(channel._packed(1, 0, Huge())) == (1, 0, 5 << 30)


def test_both_ends_tell_when_the_other_has_gone(leader):
    rank = come(leader)
    leader.begin(60.0)
    del rank
    with pytest.raises(RankError, match="the process of rank 0 has ended"):
        leader.receive(60.0)
    again = channel.LeaderChannel(1)
    rank = come(again)
    again.close()
    with pytest.raises(channel.LeaderGoneError):
        rank.receive()


def test_whoever_has_another_key_is_not_let_in(leader):
    address = leader.address._replace(key=bytes(32))
    turned_away = []

    def knock():
        with pytest.raises(OSError, match=r"hung up|reset"):
            channel.RankChannel(address, 0, 1)
        turned_away.append(True)

    thread = threading.Thread(target=knock)
    thread.start()
    assert not leader.accept(60.0)
    thread.join()
    assert turned_away


def test_a_rank_does_not_follow_who_listens_without_the_key(leader):
    with socket.create_server(("127.0.0.1", 0)) as impostor:
        address = leader.address._replace(endpoint=impostor.getsockname())
        thread = threading.Thread(target=impersonate, args=(impostor,))
        thread.start()
        with pytest.raises(ConnectionRefusedError, match="it has another key"):
            channel.RankChannel(address, 0, 1)
        thread.join()


def impersonate(listener):
    """Say what a door says, but for the proof."""
    peer, _ = listener.accept()
    with peer:
        peer.sendall(bytes(32))
        peer.recv(1000)
        peer.sendall(bytes(32))
