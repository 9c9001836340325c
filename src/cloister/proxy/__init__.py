"""A local verifying proxy: an OpenAI- and Anthropic-compatible endpoint on 127.0.0.1 in front of verified enclaves, and a
web chat.

app           routes, limits, who went away
guard         who may ask: exact Host, no foreign page, no other user of this machine
key           what programs show where the system does not tell users apart
origin        the name at which an app's pages are pages, and no part of anything else's origin
upstreams     several enclaves behind one proxy, and which of them a request is for
forward       what of a request goes into the seal, and of an answer comes out of it
verification  what is believed of each enclave, as JSON
dialect       the proxy's own errors, as the caller's API words them
metrics       counters without content
chat          the web chat's own routes: page (its built files), launch (one-time tokens), vault (the key of what it keeps)
reply         an answer of the proxy's own
serving       the HTTP server around it
"""

from cloister.proxy.app import ProxyConfig, create_proxy
from cloister.proxy.chat import Chat
from cloister.proxy.upstreams import Upstream

__all__ = ["Chat", "ProxyConfig", "Upstream", "create_proxy"]
