"""`cloister image boot`: the two disks that a machine of the measured image is given where no `cloister host` starts it, as in
a cloud: what it runs, and the app. Both may be seen by everybody."""

import os
import shlex
import shutil
from pathlib import Path

from cloister.cli import output
from cloister.cli.deployments import Deployment, Wishes, prepare, write_policy
from cloister.errors import WrongUse
from cloister.host.qemu import GUEST_PORT, SECTOR, BootLine

__all__ = ["write_disks"]


def write_disks(folder: Path, wishes: Wishes, out: Path, *, as_json: bool) -> None:
    """Packages the app as `deploy` does, and counts one release more. The deployment's policy is written beside the disks.

    Raises: WrongUse; what `prepare` raises.
    """
    if not wishes.broker:
        hint = "`cloister broker init` makes one and shows its key: --broker KEY."
        raise WrongUse("Nobody would release the app: name a broker.", step="broker", hint=hint)
    made, _ = prepare(folder, wishes)
    try:
        out.mkdir(parents=True, exist_ok=True)
        boot, data = _write(made, out)
        policy = out / "policy.toml"
        write_policy(made, policy)
    except OSError as error:
        raise WrongUse(f"{out} cannot be written.", got=error.strerror) from error
    address = f"http://ADDRESS:{GUEST_PORT}"
    told = {
        "boot": str(boot),
        "data": str(data),
        "policy": str(policy),
        "release": [
            shlex.join(["cloister", "broker", "add", made.name, str(folder), *_given(wishes)]),
            shlex.join(["cloister", "broker", "serve", "--policy", str(policy), "--watch", address]),
        ],
        "url": f"{address}/{made.fragment}",
    }
    if as_json:
        output.json_value(told)
        return
    output.line(f"boot    {boot}")
    output.line(f"data    {data}")
    output.line(f"policy  {policy}")
    output.note("Attach both, read-only, to a machine that boots the image; then, where the broker's key is:")
    for line in told["release"]:
        output.line(line)
    output.note(f"It answers at {told['url']}")


def _given(wishes: Wishes) -> list[str]:
    """Of what was packaged here, the options that `cloister broker add` has too."""
    files = {"--bundle": wishes.bundle, "--api-keys": wishes.api_keys}
    return [word for option, file in files.items() if file is not None for word in (option, str(file))]


def _write(made: Deployment, out: Path) -> tuple[Path, Path]:
    """Each whole or not at all."""
    if made.bundle is None:
        raise WrongUse("There is no bundle.", step="bundle")
    bundle, _ = made.bundle
    line = BootLine(launch=made.launch, config=made.config, data="bundle", data_bytes=bundle.stat().st_size)
    boot, data = out / "boot.raw", out / "data.raw"
    for place in (boot, data):
        place.unlink(missing_ok=True)  # of another release: the two belong together
    draft = out / ".draft"
    shutil.copyfile(bundle, draft)
    os.truncate(draft, -(-draft.stat().st_size // SECTOR) * SECTOR)
    draft.replace(data)
    draft.write_bytes(line.encode())
    draft.replace(boot)
    return boot, data
