"""Batches made ahead by threads: the same ones, few of them, and in the device's own order."""

import threading
from contextlib import contextmanager

import pytest
import torch

from tilepipe.errors import TrainError
from tilepipe.train import ahead
from tilepipe.train.ahead import batches, threads_for

CPU = torch.device("cpu")


class Numbers:
    """Samples that say which they are; in which order they were begun, and by which threads."""

    def __init__(self, *, weighted=True, broken=()):
        self.weighted, self.broken = weighted, broken
        self.begun, self.threads = [], set()

    def sample(self, step, place, device):
        del device
        self.begun.append((step, place))
        self.threads.add(threading.current_thread().name)
        if (step, place) in self.broken:
            raise TrainError(f"no sample {step}, {place}")
        number = torch.full((1, 2, 2), 100.0 * step + place)
        return number, number[0].long(), number[0] if self.weighted else None


@pytest.fixture(autouse=True)
def torch_counts_threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [0, 1, 3, 8])
@pytest.mark.parametrize("size", [1, 4])
def test_batches_are_the_same_and_in_order_whoever_makes_them(threads, size):
    draws = Numbers(weighted=size == 4)
    made = batches(draws, first=7, size=size, device=CPU, threads=threads)
    for step in range(7, 19):
        batch = next(made)
        wanted = [100 * step + place for place in range(size)]
        assert batch.images[:, 0, 0, 0].tolist() == wanted
        assert batch.targets[:, 1, 1].tolist() == wanted
        if draws.weighted:
            assert batch.weights[:, 1, 1].tolist() == wanted
        else:
            assert batch.weights is None
        if threads == 0:
            assert len(draws.begun) == (step - 6) * size
        else:
            assert len(draws.begun) <= (step - 6) * size + max(size, threads)
    made.close()
    mine = threading.current_thread().name
    assert draws.threads == {mine} if threads == 0 else mine not in draws.threads
    assert not [one for one in threading.enumerate() if one.name.startswith("tilepipe-sample")]


def test_while_a_batch_is_learnt_from_all_of_the_next_is_made():
    there = threading.Barrier(5, timeout=30)
    draws = Numbers()
    plain = draws.sample

    def sample(step, place, device):
        if step == 1:
            there.wait()
        return plain(step, place, device)

    draws.sample = sample
    made = batches(draws, first=0, size=4, device=CPU, threads=4)
    next(made)
    there.wait()  # all four samples of step 1 are under way, and nobody has asked for them
    assert next(made).images[:, 0, 0, 0].tolist() == [100, 101, 102, 103]
    made.close()


@pytest.mark.parametrize("threads", [0, 4])
def test_an_image_that_cannot_be_read_ends_the_step_that_it_is_in(threads):
    made = batches(Numbers(broken=[(2, 1)]), first=0, size=4, device=CPU, threads=threads)
    assert [int(next(made).images[0, 0, 0, 0]) for _ in range(2)] == [0, 100]
    with pytest.raises(TrainError, match="no sample 2, 1"):
        next(made)


def test_threads_leave_a_core_to_who_learns_and_a_processor_has_none_over(monkeypatch):
    gpu = torch.device("cuda", 1)
    found = []
    for cores in (1, 2, 6, 64):
        monkeypatch.setattr(ahead, "cores", lambda cores=cores: cores)
        found.append(threads_for(gpu))
    assert found == [1, 1, 5, 8]
    assert threads_for(CPU) == 0


class FakeStreams:
    """torch.cuda as far as samples need it: which stream a thread is in, and what is waited for."""

    def __init__(self):
        self.log, self.here, self.lock = [], threading.local(), threading.Lock()
        self.made = 0

    def Stream(self, device):
        assert device == torch.device("cuda", 1)
        with self.lock:
            self.made += 1
            stream = FakeStream(self, f"own {self.made}")
        return stream

    @contextmanager
    def stream(self, stream):
        self.here.stream = stream
        yield
        del self.here.stream

    def current_stream(self, device):
        assert device == torch.device("cuda", 1)
        return getattr(self.here, "stream", "the network's")


class FakeStream:
    def __init__(self, cuda, name):
        self.cuda, self.name, self.waiting = cuda, name, set()

    def synchronize(self):
        self.cuda.log += [("done", one) for one in self.waiting]
        self.waiting.clear()


def test_on_a_gpu_each_thread_works_in_its_own_stream_and_hands_its_memory_over(monkeypatch):
    cuda, recorded, streams = FakeStreams(), [], {}
    monkeypatch.setattr(ahead.torch, "cuda", cuda)

    def record_stream(tensor, stream):
        recorded.append((int(tensor.flatten()[0]), stream))
        assert ("done", int(tensor.flatten()[0])) in cuda.log

    monkeypatch.setattr(torch.Tensor, "record_stream", record_stream)
    draws, meet = Numbers(), threading.Barrier(3, timeout=30)
    plain = draws.sample

    def sample(step, place, device):
        stream = cuda.current_stream(device)
        stream.waiting.add(100 * step + place)
        streams.setdefault(threading.current_thread().name, set()).add(stream.name)
        meet.wait()  # three threads at once
        return plain(step, place, device)

    draws.sample = sample
    made = batches(draws, first=0, size=3, device=torch.device("cuda", 1), threads=3)
    for _ in range(2):
        next(made)
    meet.abort()
    made.close()
    assert len(streams) == 3
    assert all(len(names) == 1 for names in streams.values())
    assert set.union(*streams.values()) == {"own 1", "own 2", "own 3"}
    # Image, classes and weights of two batches.
    wanted = [100 * step + place for step in range(2) for place in range(3) for _ in range(3)]
    assert recorded == [(number, "the network's") for number in wanted]
