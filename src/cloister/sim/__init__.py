"""A software TEE for laptops and tests: throw-away root, chip key, reports, and a measurement of the code that runs.

It proves what hardware would prove, to nobody: whoever runs it holds its keys. Trusted only by a policy that names its
root.
"""

from cloister.sim.device import Device, LaunchedEnclave
from cloister.sim.measure import Measurement, engine_digest, measure

__all__ = ["Device", "LaunchedEnclave", "Measurement", "engine_digest", "measure"]
