from __future__ import annotations

import pytest

from dysl_vla.errors import ConfigError
from dysl_vla.provenance import home, origins


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
    assert home(first, "", "") == ("push", "push-it")
    later = {**demonstrations(lift=10), "init": first, "skipping": demonstrations(push=100)}
    assert home(later, "", "") == ("lift", "lift-it"), "the last training decides, however long the first was"
    foreign = {**demonstrations(), "init": first}
    assert home(foreign, "", "") == ("push", "push-it")
    assert home({"skipping": first}, "", "") == ("push", "push-it")
    assert len(list(origins(later))) == 4


@pytest.mark.parametrize("record", [None, {}, {"data": {}}, {"data": {"origins": []}}])
def test_a_policy_without_demonstrations_has_no_home(record: object) -> None:
    with pytest.raises(ConfigError, match=r"suite.*name one"):
        home(record, "", "")


def test_what_is_asked_for_is_played() -> None:
    record = demonstrations(lift=2)
    assert home(record, "push", "") == ("push", "")
    assert home(record, "", "lower") == ("lift", "lower")
    assert home(None, "push", "down") == ("push", "down")
