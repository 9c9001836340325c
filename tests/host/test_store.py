import contextlib
import random
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests.host.record import APP

from cloister.errors import Conflict, HostFull, NotFound, WrongUse
from cloister.host.store import MOST_LINES, MOST_SAMPLES, MOST_TEXT, Sample, Store, TokenRecord


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "host.db"


def test_what_was_put_is_there_in_the_next_process(path: Path) -> None:
    store = Store(path)
    store.put(APP)
    store.put(replace(APP, name="two", port=8501, bundle=None, model="tiny", expires_at=9.5))
    store.log("one", 2.0, "ready", "words")
    store.close()
    again = Store(path)
    assert again.apps() == [APP, replace(APP, name="two", port=8501, bundle=None, model="tiny", expires_at=9.5)]
    assert [(line.kind, line.text) for line in again.lines("one")] == [("ready", "words")]


def test_the_state_of_a_former_release_is_taken_over(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        for statement in _FORMER:
            db.execute(statement)
        db.commit()
    store = Store(path)
    assert store.apps() == [APP]
    store.put(replace(APP, name="two", port=8501, tls_port=8502))
    store.close()
    assert [app.tls_port for app in Store(path).apps()] == [None, 8502]


_FORMER = (
    """CREATE TABLE app (
  name TEXT PRIMARY KEY, port INTEGER NOT NULL UNIQUE, owner TEXT NOT NULL, launch BLOB NOT NULL, config BLOB NOT NULL,
  bundle TEXT, model TEXT, memory_bytes INTEGER NOT NULL, cores INTEGER NOT NULL, expires_at REAL,
  restart TEXT NOT NULL CHECK (restart IN ('always', 'never')), wanted TEXT NOT NULL CHECK (wanted IN ('run', 'stop')),
  deployed_by TEXT NOT NULL, created_at REAL NOT NULL, changed_at REAL NOT NULL
) STRICT""",
    f"""INSERT INTO app VALUES ('one', 8500, '{APP.owner}', x'6c61756e6368', x'636f6e666967', '{APP.bundle}', NULL, 1073741824, 1,
  NULL, 'always', 'run', 'me', 1.0, 1.0)""",
    "PRAGMA user_version = 1",
)
"""Schema 1, with one app."""


def test_a_state_of_this_release_is_opened_without_a_write(path: Path) -> None:
    """A full disk keeps no host from starting."""
    with contextlib.closing(Store(path)) as store:
        store.put(APP)
    with contextlib.closing(Store(path)) as store:
        assert store.apps() == [APP]
        assert path.with_name("host.db-wal").stat().st_size == 0


def test_the_file_is_its_users_alone(path: Path) -> None:
    Store(path)
    assert path.stat().st_mode & 0o077 == 0


def test_changes_are_of_one_app(path: Path) -> None:
    store = Store(path)
    store.put(APP)
    store.put(replace(APP, name="two", port=8501))
    assert store.want("one", "stop", 5.0) == replace(APP, wanted="stop", changed_at=5.0)
    assert store.expire("one", 7.0, 6.0).expires_at == 7.0
    assert store.app("two").wanted == "run"
    store.remove("one")
    assert [app.name for app in store.apps()] == ["two"]
    for ask in (lambda: store.app("one"), lambda: store.remove("one"), lambda: store.want("one", "run", 1.0)):
        with pytest.raises(NotFound):
            ask()


def test_an_app_that_comes_back_does_not_find_the_old_ones_log(path: Path) -> None:
    store = Store(path)
    store.put(APP)
    store.log("one", 1.0, "ready")
    store.sample("one", Sample(1.0, 1, 1.0, 1, 1, 1))
    store.remove("one")
    store.put(APP)
    assert store.lines("one") == []
    assert store.samples("one") == []


def test_logs_and_samples_are_bounded(path: Path) -> None:
    store = Store(path)
    store._db.execute("PRAGMA synchronous = OFF")  # the disk is not what is tested
    store.log("other", 0.0, "ready")
    for number in range(MOST_LINES + 50):
        store.log("one", float(number), "app", "x" * (MOST_TEXT + 1))
    for number in range(MOST_SAMPLES + 50):
        store.sample("one", Sample(float(number), 1, 1.0, 1, 1, 1))
    lines = store.lines("one", most=1 << 20)
    assert [line.at for line in (lines[0], lines[-1])] == [50.0, MOST_LINES + 49.0]
    assert {len(line.text) for line in lines} == {MOST_TEXT}
    assert len(store.samples("one")) == MOST_SAMPLES
    assert len(store.lines("other")) == 1
    assert [line.seq for line in store.lines("one", after=lines[-3].seq)] == [lines[-2].seq, lines[-1].seq]


def test_a_state_of_another_release_is_refused(path: Path) -> None:
    Store(path).close()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(WrongUse, match="another release"):
        Store(path)


def test_what_is_no_state_is_refused(path: Path) -> None:
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(WrongUse, match="cannot be opened"):
        Store(path)


def test_tokens_have_names_of_their_own(path: Path) -> None:
    store = Store(path)
    store.add_token(TokenRecord("me", "ab" * 32, 1.0))
    with pytest.raises(Conflict):
        store.add_token(TokenRecord("me", "cd" * 32, 1.0))
    store.remove_token("me")
    with pytest.raises(NotFound):
        store.remove_token("me")
    assert store.tokens() == []


def test_a_full_disk_changes_nothing_and_the_log_goes_without(path: Path) -> None:
    store = Store(path)
    store.put(APP)
    (pages,) = store._db.execute("PRAGMA page_count").fetchone()
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(HostFull):
        for number in range(1000):
            store.put(replace(APP, name=f"more-{number}", port=9000 + number, launch=bytes(60_000)))
    before = store.apps()
    store.log("one", 1.0, "app", "x" * 400)
    for _ in range(100):
        store.sample("one", Sample(1.0, 1, 1.0, 1, 1, 1))
    assert store.apps() == before
    assert before[-1] == APP
    store._db.execute("PRAGMA max_page_count = 1000000")
    store.put(replace(APP, wanted="stop"))
    assert store.app("one").wanted == "stop"


def test_a_change_that_breaks_off_is_no_change(path: Path) -> None:
    store = Store(path)
    store.put(APP)
    store.log("one", 1.0, "ready")

    def half() -> None:
        with store._change() as db:
            db.execute("DELETE FROM app")
            db.execute("DELETE FROM nothing")

    with pytest.raises(sqlite3.OperationalError):
        half()
    assert store.apps() == [APP]
    store.remove("one")
    assert (store.apps(), store.lines("one")) == ([], [])


_WRITER = """
import sys, random
from dataclasses import replace
from pathlib import Path
from cloister.host.store import Store
from tests.host.record import APP
store = Store(Path(sys.argv[1]))
number = int(sys.argv[2])
while True:
    number += 1
    store.put(replace(APP, created_at=float(number), launch=b"%d" % number, config=b"%d" % number * 500))
    store.log("one", float(number), "round", str(number))
    print(number, flush=True)
"""


def test_fifty_kills_at_random_moments_lose_nothing_that_was_said_to_be_done(path: Path) -> None:
    chance = random.Random(6)
    done = 0
    root = Path(__file__).parents[2]
    for _ in range(50):
        process = subprocess.Popen(
            [
                sys.executable,
                "-S",
                "-c",
                f"import sys; sys.path[:0] = {[str(root), *sys.path]!r}\n{_WRITER}",
                str(path),
                str(done),
            ],
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        for _ in range(chance.randrange(1, 12)):
            done = int(process.stdout.readline())
        process.kill()
        assert process.wait() == -signal.SIGKILL
        told = process.stdout.read().split()
        process.stdout.close()
        done = int(told[-1]) if told else done
        with contextlib.closing(Store(path)) as store:
            (app,) = store.apps()
            number = int(app.created_at)
            assert number in (done, done + 1)  # the last one may have been kept before it could say so
            assert (app.launch, app.config) == (b"%d" % number, b"%d" % number * 500)
            assert [int(line.text) for line in store.lines("one", most=3)][-1] in (number, number - 1)
            assert store._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            done = number
