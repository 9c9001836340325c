"""A local verifying proxy: an OpenAI-compatible endpoint on 127.0.0.1 in front of a verified enclave, and a web chat.

app      routes, forwarding, errors in OpenAI's envelope
guard    who may ask: exact Host, no foreign page, no other user of this machine
chat     the web chat's own routes: page (its built files), launch (one-time tokens), vault (the key of what it keeps)
reply    an answer of the proxy's own
"""

from cloister.proxy.app import ProxyConfig, create_proxy
from cloister.proxy.chat import Chat

__all__ = ["Chat", "ProxyConfig", "create_proxy"]
