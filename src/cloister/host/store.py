"""What the host remembers: apps, tokens' digests, logs and samples, in one SQLite file that survives kill -9.

Every change is one transaction, synced before it counts. Nothing in here is secret but to the operator: bundles are
sealed, tokens rest as digests, and logs hold what enclaves say about themselves.
"""

import contextlib
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from cloister.errors import Conflict, HostFull, NotFound, WrongUse

__all__ = ["App", "Line", "Restart", "Sample", "State", "Store", "TokenRecord", "Wanted"]

SCHEMA = 2
MOST_LINES = 2000  # of log, for each app
MOST_SAMPLES = 1440
MOST_TEXT = 500  # characters of one line

Wanted: TypeAlias = Literal["run", "stop"]
Restart: TypeAlias = Literal["always", "never"]
State: TypeAlias = Literal[
    "stopped", "starting", "waiting", "opening", "loading", "ready", "restarting", "failed", "expired"
]

_TABLES = """
CREATE TABLE app (
  name TEXT PRIMARY KEY, port INTEGER NOT NULL UNIQUE, tls_port INTEGER, owner TEXT NOT NULL, launch BLOB NOT NULL,
  config BLOB NOT NULL, bundle TEXT, model TEXT, memory_bytes INTEGER NOT NULL, cores INTEGER NOT NULL, expires_at REAL,
  restart TEXT NOT NULL CHECK (restart IN ('always', 'never')), wanted TEXT NOT NULL CHECK (wanted IN ('run', 'stop')),
  deployed_by TEXT NOT NULL, created_at REAL NOT NULL, changed_at REAL NOT NULL
) STRICT;
CREATE TABLE token (name TEXT PRIMARY KEY, sha256 TEXT NOT NULL UNIQUE, created_at REAL NOT NULL) STRICT;
CREATE TABLE line (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, app TEXT NOT NULL, at REAL NOT NULL, kind TEXT NOT NULL, text TEXT NOT NULL
) STRICT;
CREATE INDEX line_of_app ON line (app, seq);
CREATE TABLE sample (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, app TEXT NOT NULL, at REAL NOT NULL, memory_bytes INTEGER NOT NULL,
  cpu_seconds REAL NOT NULL, connections INTEGER NOT NULL, received INTEGER NOT NULL, sent INTEGER NOT NULL
) STRICT;
CREATE INDEX sample_of_app ON sample (app, seq);
"""
_SINCE = {1: "ALTER TABLE app ADD COLUMN tls_port INTEGER"}
"""What makes of each former schema the next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class App:
    """One deployed app as it was asked for. `port`: its stable one; `tls_port`: that of its TLS listener, if it has one.
    `owner`: the launch config's owner key. `launch` and
    `config`: exact bytes. `bundle`: the SHA-256 of a stored bundle, or None for a built-in app with a public `model`.
    `memory_bytes` and `cores` are limits. `expires_at`: Unix seconds, None = never. `deployed_by`: a token's name."""

    name: str
    port: int
    tls_port: int | None
    owner: str
    launch: bytes
    config: bytes
    bundle: str | None
    model: str | None
    memory_bytes: int
    cores: int
    expires_at: float | None
    restart: Restart
    wanted: Wanted
    deployed_by: str
    created_at: float
    changed_at: float


@dataclass(frozen=True, slots=True)
class Line:
    """One line of an app's log. `kind`: what happened ("ready"), or "app" for the app's own words."""

    seq: int
    at: float
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Sample:
    """What an app took at one moment. `cpu_seconds`, `connections`, `received` and `sent` (bytes) count from its start."""

    at: float
    memory_bytes: int
    cpu_seconds: float
    connections: int
    received: int
    sent: int


@dataclass(frozen=True, slots=True)
class TokenRecord:
    name: str
    sha256: str
    created_at: float


_APP = ", ".join(field.name for field in fields(App))
_SAMPLE = ", ".join(field.name for field in fields(Sample))


class Store:
    """One open state file. Threads may share it; another process may write tokens beside it."""

    def __init__(self, path: Path) -> None:
        """Opens it, or makes it, readable by its user alone.

        Raises: WrongUse for a file that is no state of this release, or cannot be opened.
        """
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = threading.Lock()
        try:
            path.touch(mode=0o600)
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._make()
        except (sqlite3.Error, OSError) as error:
            raise WrongUse(f"{path} cannot be opened as the host's state: {error}.", step="state") from error

    def _make(self) -> None:
        with self._change() as db:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version == 0:
                for statement in _TABLES.split(";\n"):
                    db.execute(statement)
            elif version in _SINCE:
                for former in range(version, SCHEMA):
                    db.execute(_SINCE[former])
            elif version != SCHEMA:
                raise WrongUse(
                    "The host's state was written by another release of cloister.",
                    hint="Start that release, or name an empty folder with --state.",
                    step="state",
                    expected=f"schema {SCHEMA}",
                    got=f"schema {version}",
                )
            if version != SCHEMA:  # else nothing is written: a full disk keeps no host from starting
                db.execute(f"PRAGMA user_version = {SCHEMA}")

    @contextlib.contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it, or nothing. Raises: HostFull."""
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                yield self._db
                self._db.execute("COMMIT")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode not in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE):
                    raise
                hint = "Nothing was changed. Free some of it and try again."
                raise HostFull("The disk of the host's state is full.", hint=hint, step="state") from error
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    def _rows(self, query: str, values: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._db.execute(query, tuple(values)).fetchall()

    def close(self) -> None:
        with self._lock:
            self._db.close()

    # Apps

    def apps(self) -> list[App]:
        """By name."""
        return [_app(row) for row in self._rows(f"SELECT {_APP} FROM app ORDER BY name")]  # noqa: S608 (own names)

    def app(self, name: str) -> App:
        """Raises: NotFound."""
        rows = self._rows(f"SELECT {_APP} FROM app WHERE name = ?", [name])  # noqa: S608
        if not rows:
            raise NotFound("The host has no app of that name.", hint="`cloister list` shows them.", step="app")
        return _app(rows[0])

    def put(self, app: App) -> None:
        """Adds it, or takes the place of the one with its name."""
        marks = ", ".join("?" for _ in fields(App))
        with self._change() as db:
            db.execute(f"INSERT OR REPLACE INTO app ({_APP}) VALUES ({marks})", astuple(app))  # noqa: S608

    def want(self, name: str, wanted: Wanted, now: float) -> App:
        return self._alter(name, now, wanted=wanted)

    def expire(self, name: str, expires_at: float | None, now: float) -> App:
        return self._alter(name, now, expires_at=expires_at)

    def _alter(self, name: str, now: float, **values: Any) -> App:
        app = replace(self.app(name), changed_at=now, **values)
        self.put(app)
        return app

    def remove(self, name: str) -> None:
        """The app with its log and samples."""
        self.app(name)
        with self._change() as db:
            db.execute("DELETE FROM app WHERE name = ?", [name])
            db.execute("DELETE FROM line WHERE app = ?", [name])
            db.execute("DELETE FROM sample WHERE app = ?", [name])

    # Logs and samples: the oldest make room for the newest, and those for which the disk has none are lost

    def log(self, app: str, at: float, kind: str, text: str = "") -> None:
        with contextlib.suppress(HostFull, sqlite3.OperationalError), self._change() as db:
            db.execute("INSERT INTO line (app, at, kind, text) VALUES (?, ?, ?, ?)", [app, at, kind, text[:MOST_TEXT]])
            _keep(db, "line", app, MOST_LINES)

    def lines(self, app: str, *, after: int = 0, most: int = 500) -> list[Line]:
        """The newest `most` of those after `after`, oldest first."""
        query = "SELECT seq, at, kind, text FROM line WHERE app = ? AND seq > ? ORDER BY seq DESC LIMIT ?"
        return [Line(*row) for row in reversed(self._rows(query, [app, after, most]))]

    def sample(self, app: str, sample: Sample) -> None:
        with contextlib.suppress(HostFull, sqlite3.OperationalError), self._change() as db:
            db.execute(
                f"INSERT INTO sample (app, {_SAMPLE}) VALUES (?, ?, ?, ?, ?, ?, ?)",  # noqa: S608
                [app, *astuple(sample)],
            )
            _keep(db, "sample", app, MOST_SAMPLES)

    def samples(self, app: str) -> list[Sample]:
        """Oldest first."""
        rows = self._rows(f"SELECT {_SAMPLE} FROM sample WHERE app = ? ORDER BY seq", [app])  # noqa: S608
        return [Sample(*row) for row in rows]

    # Tokens

    def tokens(self) -> list[TokenRecord]:
        return [TokenRecord(*row) for row in self._rows("SELECT name, sha256, created_at FROM token ORDER BY name")]

    def add_token(self, record: TokenRecord) -> None:
        """Raises: Conflict when the name is taken."""
        try:
            with self._change() as db:
                db.execute("INSERT INTO token VALUES (?, ?, ?)", astuple(record))
        except sqlite3.IntegrityError as error:
            hint = "Choose another name, or remove that one: cloister host token remove NAME"
            raise Conflict("There is a token of that name already.", hint=hint, step="token") from error

    def remove_token(self, name: str) -> None:
        """Raises: NotFound."""
        with self._change() as db:
            gone = db.execute("DELETE FROM token WHERE name = ?", [name]).rowcount
        if not gone:
            raise NotFound("There is no token of that name.", hint="cloister host token list", step="token")


def _app(row: tuple[Any, ...]) -> App:
    return App(**dict(zip((field.name for field in fields(App)), row, strict=True)))


def _keep(db: sqlite3.Connection, table: Literal["line", "sample"], app: str, most: int) -> None:
    db.execute(
        f"DELETE FROM {table} WHERE app = ?1 AND seq <= "  # noqa: S608
        f"(SELECT seq FROM {table} WHERE app = ?1 ORDER BY seq DESC LIMIT 1 OFFSET ?2)",
        [app, most],
    )
