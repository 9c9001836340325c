from cloister.host.metrics import render

USAGE = {"memory_bytes": 5, "cpu_seconds": 1.5, "connections": 2, "received": 3, "sent": 4}
APPS = [
    {"name": "one", "state": "ready", "starts": 2, "usage": USAGE},
    {"name": "two", "state": "waiting", "starts": 1, "usage": None},
]


def test_every_sample_has_its_type_and_help() -> None:
    lines = render(APPS, 9).splitlines()
    assert 'cloister_app_up{app="one"} 1' in lines
    assert 'cloister_app_up{app="two"} 0' in lines
    assert 'cloister_app_cpu_seconds_total{app="one"} 1.5' in lines
    assert not any(line.startswith('cloister_app_memory_bytes{app="two"}') for line in lines)
    assert "cloister_bundle_bytes 9" in lines
    names = {line.split("{")[0].split()[0] for line in lines if not line.startswith("#")}
    assert names == {line.split()[2] for line in lines if line.startswith("# TYPE")}
    assert names == {line.split()[2] for line in lines if line.startswith("# HELP")}
