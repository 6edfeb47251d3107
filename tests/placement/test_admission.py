import pytest

from engine.errors import Overloaded
from engine.request import Request
from placement.routing.admission import Admission, AdmissionSettings, Forecast


def request(name: str, tenant: str = "", priority: int = 0, tokens: int = 10, at_s: float = 0.0):
    return Request(name, (1,) * tokens, priority=priority, arrival_s=at_s, tenant=tenant)


def submit_all(admission: Admission, *requests: Request) -> None:
    for one in requests:
        admission.submit(one, None)


def drain(admission: Admission) -> list[str]:
    """Everything in the order it goes, each first token arriving at once."""
    order = []
    while (one := admission.next(1)) is not None:
        order.append(one.id)
        admission.prefilled(one.id)
    return order


def test_the_tenant_served_least_goes_next():
    admission = Admission()
    submit_all(admission, *(request(f"a{n}", "alice", tokens=100) for n in range(3)))
    submit_all(admission, *(request(f"b{n}", "bob", tokens=10) for n in range(3)))
    assert drain(admission) == ["a0", "b0", "b1", "b2", "a1", "a2"]


def test_output_tokens_count_against_a_share():
    admission = Admission(AdmissionSettings(output_weight=2.0))
    submit_all(admission, request("a0", "alice"), request("b0", "bob"))
    assert drain(admission) == ["a0", "b0"]
    admission.charge("alice", 100)
    submit_all(admission, request("a1", "alice"), request("b1", "bob"))
    assert drain(admission) == ["b1", "a1"]


def test_time_away_earns_no_credit():
    admission = Admission()
    submit_all(admission, *(request(f"a{n}", "alice", tokens=100) for n in range(4)))
    first = admission.next(1)
    admission.prefilled(first.id)
    submit_all(admission, *(request(f"b{n}", "bob", tokens=100) for n in range(2)))
    assert admission.served_tokens()["bob"] == 100.0
    assert drain(admission) == ["a1", "b0", "a2", "b1", "a3"]


def test_the_most_urgent_goes_first_whatever_its_share():
    admission = Admission()
    submit_all(admission, request("low", priority=-1), request("mid"), request("high", priority=5))
    assert drain(admission) == ["high", "mid", "low"]


def test_only_so_many_go_ahead_of_their_first_token():
    admission = Admission(AdmissionSettings(ahead_requests=2, ahead_tokens=0))
    submit_all(admission, *(request(f"r{n}") for n in range(6)))
    assert [admission.next(2).id for _ in range(4)] == ["r0", "r1", "r2", "r3"]
    assert admission.next(2) is None
    admission.prefilled("r1")
    assert admission.next(2).id == "r4"
    assert admission.next(0) is None


def test_short_prompts_go_ahead_up_to_a_batch_of_tokens():
    admission = Admission(AdmissionSettings(ahead_requests=1, ahead_tokens=25))
    submit_all(admission, *(request(f"r{n}", tokens=10) for n in range(5)))
    assert [admission.next(1).id for _ in range(3)] == ["r0", "r1", "r2"]
    assert admission.next(1) is None
    admission.ended("r1")
    assert admission.next(1).id == "r3"


def test_queues_are_bounded_as_a_whole_and_for_each_tenant():
    admission = Admission(AdmissionSettings(queue_requests=3, tenant_queue_requests=2))
    submit_all(admission, request("a0", "alice"), request("a1", "alice"))
    with pytest.raises(Overloaded, match="this tenant"):
        admission.submit(request("a2", "alice"), None)
    admission.submit(request("b0", "bob"), None)
    with pytest.raises(Overloaded, match="3 requests are waiting"):
        admission.submit(request("c0", "carol"), None)


def test_requests_under_way_are_bounded():
    admission = Admission(AdmissionSettings(live_requests=1))
    admission.submit(request("r0"), None)
    admission.next(1)
    with pytest.raises(Overloaded, match="under way"):
        admission.submit(request("r1"), None)
    admission.ended("r0")
    admission.submit(request("r1"), None)


def test_a_stated_target_that_the_queue_would_miss_is_refused_with_the_time_to_wait():
    admission = Admission()
    with pytest.raises(Overloaded) as caught:
        admission.submit(request("r"), Forecast(ttft_s=5.0, alone_s=0.5), strict=True)
    assert caught.value.retry_after_s == pytest.approx(5.0 - 2.5)


def test_without_a_stated_target_patience_is_longer():
    admission = Admission(AdmissionSettings(patience=10.0))
    admission.submit(request("r"), Forecast(ttft_s=19.0, alone_s=0.5))
    with pytest.raises(Overloaded):
        admission.submit(request("s"), Forecast(ttft_s=21.0, alone_s=0.5))


def test_a_target_out_of_reach_even_when_idle_is_no_overload():
    admission = Admission()
    admission.submit(request("long"), Forecast(ttft_s=30.0, alone_s=30.0), strict=True)
    assert admission.waiting_requests == 1


def test_ends_leave_nothing_behind_wherever_a_request_was():
    admission = Admission()
    submit_all(admission, request("waits"), request("runs"), request("streams"))
    admission.ended("waits")
    admission.next(1)
    admission.next(1)
    admission.prefilled("streams")
    for name in ("runs", "streams", "never seen"):
        admission.ended(name)
    assert admission.live_requests == 0
    assert admission.waiting_tokens == 0
    assert admission.next(1) is None


def test_idle_tenants_are_forgotten_at_the_bound():
    admission = Admission(AdmissionSettings(tenants=2))
    for name in ("a", "b", "c"):
        admission.submit(request(name, name), None)
        admission.next(9)
        admission.ended(name)
    assert list(admission.served_tokens()) == ["c"]
