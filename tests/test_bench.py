"""The history of benches: what is written, and when a fall is told."""

import json

from fedsieve.bench import history


def test_a_figure_that_fell_by_more_than_a_fifth_is_told(tmp_path):
    path = tmp_path / "results" / "bench.jsonl"
    for ratio in (1.5, 1.6, 1.4):
        history.add("rounds", {"J1": ratio, "J2": 2.0}, path)
    assert list(history.falls(path)) == []
    history.add("rounds", {"J1": 1.21, "J2": 2.0}, path)
    assert list(history.falls(path)) == []
    history.add("rounds", {"J1": 1.1, "J2": 3.0}, path)
    (told,) = history.falls(path)
    assert told.startswith("rounds: J1 fell from 1.45 to 1.1 (-24%) on ")
    line = json.loads(path.read_text().splitlines()[0])
    assert line["figures"] == {"J1": 1.5, "J2": 2.0}
    assert set(line) == {"bench", "figures", "machine", "commit", "ended"}


def test_machines_are_not_compared_with_one_another(tmp_path):
    path = tmp_path / "bench.jsonl"
    history.add("rounds", {"J1": 2.0}, path)
    line = json.loads(path.read_text()) | {"machine": "another", "figures": {"J1": 0.5}}
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")
    assert list(history.falls(path)) == []
