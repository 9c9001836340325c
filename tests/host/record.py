"""One app's record, for tests and for the processes that they kill."""

from cloister.host.store import App

APP = App(
    name="one",
    port=8500,
    tls_port=None,
    owner="ed25519:" + "A" * 43,
    launch=b"launch",
    config=b"config",
    bundle="ab" * 32,
    model=None,
    memory_bytes=1 << 30,
    cores=1,
    expires_at=None,
    restart="always",
    wanted="run",
    deployed_by="me",
    created_at=1.0,
    changed_at=1.0,
)
