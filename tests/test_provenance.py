from __future__ import annotations

import pytest

from dysl_vla.errors import ConfigError
from dysl_vla.provenance import origins, training_suite


def demonstrations(**episodes: int) -> dict[str, object]:
    return {
        "data": {
            "origins": [
                {"suite": suite, "task": f"{suite}-it", "seed": 0, "episodes": n} for suite, n in episodes.items()
            ]
        }
    }


def test_a_policy_is_at_home_where_most_of_its_demonstrations_are() -> None:
    first = demonstrations(lift=10, push=15)
    assert training_suite(first) == ("push", "push-it")
    later = {**demonstrations(lift=10), "init": first, "skipping": demonstrations(push=100)}
    assert training_suite(later) == ("lift", "lift-it"), "the last training decides, however long the first was"
    foreign = {**demonstrations(), "init": first}
    assert training_suite(foreign) == ("push", "push-it")
    assert training_suite({"skipping": first}) == ("push", "push-it")
    assert len(list(origins(later))) == 4


@pytest.mark.parametrize("record", [None, {}, {"data": {}}, {"data": {"origins": []}}])
def test_a_policy_without_demonstrations_has_no_home(record: object) -> None:
    with pytest.raises(ConfigError, match=r"suite.*name one"):
        training_suite(record)


def test_what_is_asked_for_is_played() -> None:
    record = demonstrations(lift=2)
    assert training_suite(record, "push") == ("push", None)
    assert training_suite(record, tasks="lower") == ("lift", "lower")
    assert training_suite(None, "push", "down") == ("push", "down")
