"""A local verifying proxy: an OpenAI-compatible endpoint on 127.0.0.1 in front of a verified enclave.

app      routes, forwarding, errors in OpenAI's envelope
guard    who may ask: exact Host, no foreign page, no other user of this machine
"""

from cloister.proxy.app import ProxyConfig, create_proxy

__all__ = ["ProxyConfig", "create_proxy"]
