from cloister.enclave.runtime.clock import Clock


class Host:
    """Whose clocks the host sets."""

    def __init__(self) -> None:
        self.wall = 1000.0
        self.monotonic = 5.0

    def clock(self) -> Clock:
        return Clock(lambda: self.wall, lambda: self.monotonic)


def test_it_follows_the_hosts_clock_forwards_and_not_backwards() -> None:
    host = Host()
    clock = host.clock()
    assert clock() == 1000
    host.wall = 1010
    assert clock() == 1010
    host.wall = 900
    assert clock() == 1010


def test_the_owners_word_is_a_floor_from_which_time_goes_on() -> None:
    host = Host()
    clock = host.clock()
    clock.raise_to(2000)
    assert clock() == 2000
    host.monotonic += 7
    assert clock() == 2007
    host.wall = 3000
    assert clock() == 3000


def test_a_clock_that_the_host_stops_goes_on_once_the_owner_has_spoken() -> None:
    host = Host()
    clock = host.clock()
    clock.raise_to(10)  # long past
    host.monotonic += 60
    assert clock() == 1060
