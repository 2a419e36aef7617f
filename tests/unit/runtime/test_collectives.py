"""Sums and gathers over the ranks of a group, and what becomes of it when one of them goes."""

import socket
import threading

import numpy as np
import pytest

from saw_trtllm.errors import RankError
from saw_trtllm.runtime.collectives import ALONE, Rendezvous, SocketCollectives, join
from tests.support.ranks import local_group, on_ranks


@pytest.mark.parametrize("size", [1, 2, 4])
def test_all_ranks_get_the_sum_in_the_order_of_the_ranks(size):
    """In fp32 the order of a sum shows in its bits; the third array is of more than a socket holds."""
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal((size, *shape)).astype(np.float32) for shape in [(3,), (), (400, 1000)]]

    def work(ours):
        return [ours.all_reduce(part[ours.rank]) for part in parts]

    for found in on_ranks(local_group(size), work):
        for part, total in zip(parts, found, strict=True):
            expected = part[0]
            for other in part[1:]:
                expected = expected + other
            assert np.array_equal(total, expected)


def test_all_ranks_get_every_ranks_array():
    found = on_ranks(local_group(3), lambda ours: ours.all_gather(np.full((2, 2), ours.rank, np.int64)))
    for parts in found:
        assert [part.tolist() for part in parts] == [[[rank] * 2] * 2 for rank in range(3)]


def test_ranks_meet_over_the_network_and_strangers_do_not_disturb():
    with Rendezvous() as meeting:
        stranger = socket.create_connection(meeting.address.endpoint)
        stranger.sendall(bytes(100))
        joined = []
        threads = [
            threading.Thread(target=lambda rank: joined.append(join(meeting.address, rank, 3)), args=(rank,))
            for rank in (2, 1)
        ]
        for thread in threads:
            thread.start()
        first = meeting.wait(3)
        for thread in threads:
            thread.join()
    group = [first, *joined]
    sums = on_ranks(group, lambda ours: ours.all_reduce(np.array([1 << ours.rank])))
    assert [total.tolist() for total in sums] == [[7]] * 3
    for ours in group:
        ours.close()
    stranger.close()


def test_a_rank_that_does_not_come_is_named():
    with Rendezvous() as meeting, pytest.raises(RankError, match=r"of 3 ranks 1, 2 did not come within 0\.05 s"):
        meeting.wait(3, timeout=0.05)
    with pytest.raises(RankError, match=r"rank 1 of 3 does not reach rank 0 at 127.0.0.1:\d+"):
        join(meeting.address, 1, 3, timeout=1)


def test_ranks_of_two_groups_do_not_mix():
    with Rendezvous() as meeting:
        thread = threading.Thread(target=join, args=(meeting.address, 1, 4))
        thread.start()
        with pytest.raises(RankError, match="rank 1 of 4 came, where one of 2 was due"):
            meeting.wait(2)
        thread.join()


@pytest.mark.parametrize("gone", [0, 2])
def test_a_rank_that_goes_ends_the_call_on_all_others(gone):
    """Of four, so that ranks that talk to rank 0 alone hear of it too."""

    def work(ours):
        if ours.rank == gone:
            ours.close()
            return None
        with pytest.raises(RankError, match="is not there any more") as caught:
            ours.all_reduce(np.ones(4))
        return str(caught.value)

    told = on_ranks(local_group(4), work)
    if gone:
        assert told[0] == "rank 2 of 4 is not there any more: see its log, and start all ranks anew"


def test_abort_ends_a_call_that_waits():
    rank0, rank1 = local_group(2)
    timer = threading.Timer(0.05, rank0.abort)
    timer.start()
    with pytest.raises(RankError, match="the group of 2 ranks was ended"):
        rank0.all_gather(np.ones(1))
    with pytest.raises(RankError):
        rank1.all_gather(np.ones(1))


def test_a_rank_out_of_step_is_told_from_one_in_step():
    def work(ours):
        with pytest.raises(RankError) as caught:
            ours.all_reduce(np.ones(3 + ours.rank))
        return str(caught.value)

    assert (
        "rank 1 of 2 is out of step with rank 0: it sent array 0 of 32 bytes where array 0 of 24"
        in on_ranks(local_group(2), work)[0]
    )


def test_a_group_of_one_needs_no_sockets():
    assert local_group(1) == [ALONE]
    assert not isinstance(ALONE, SocketCollectives)
    assert ALONE.all_reduce(np.ones(2)).tolist() == [1, 1]
