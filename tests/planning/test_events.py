"""Simulated time: who waits for whom, and for how long."""

from nft_ray.planning.events import Card, Clock, Crew, Process, Room, Signal, together


def test_who_works_alone_on_a_card_has_all_of_it_and_two_have_half_each():
    clock, ends = Clock(), {}
    card = Card(clock)

    def work(name: str, start: float, seconds: float) -> Process:
        yield clock.wait(start)
        yield card.work(seconds)
        ends[name] = clock.now

    for job in (("first", 0.0, 4.0), ("second", 2.0, 1.0), ("third", 100.0, 1.0)):
        clock.start(work(*job))
    clock.run()

    # 2 s alone, then both at half speed: the second ends at 4, the first has 1 s left
    assert ends == {"first": 5.0, "second": 4.0, "third": 101.0}
    assert card.busy_s == 6.0


def test_room_is_given_in_the_order_in_which_it_was_asked_for():
    clock, log = Clock(), []
    room = Room(2)

    def visit(name: str) -> Process:
        yield room.taken()
        log.append((clock.now, name))
        yield clock.wait(1.0)
        room.give_back()

    for name in "abcde":
        clock.start(visit(name))
    clock.run()

    assert log == [(0.0, "a"), (0.0, "b"), (1.0, "c"), (1.0, "d"), (2.0, "e")]


def test_a_crew_gives_a_call_to_whoever_has_the_fewest():
    crew = Crew(3, each=2)
    got: list[int] = []
    for _ in range(7):
        crew.taken().then(got.append)

    assert got == [0, 1, 2, 0, 1, 2], "the seventh finds no room"
    crew.give_back(1)
    assert got[6] == 1


def test_among_equals_it_is_whose_last_call_is_the_oldest():
    crew = Crew(2, each=2)
    got: list[int] = []
    for _ in range(3):
        crew.taken().then(got.append)
    crew.give_back(0)  # one each is left, and 0 was given the newer one
    crew.taken().then(got.append)

    assert got == [0, 1, 0, 1]


def test_together_waits_for_the_last_and_keeps_the_order():
    clock, found = Clock(), []
    signals = [Signal(), Signal()]
    together(signals).then(found.append)
    clock.after(2.0, lambda: signals[0].fire("slow"))
    clock.after(1.0, lambda: signals[1].fire("fast"))
    clock.run()

    assert found == [["slow", "fast"]]
    assert together([]).fired
