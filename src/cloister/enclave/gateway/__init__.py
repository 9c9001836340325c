"""The enclave's front door: opens sealed requests, calls the app inside in process, seals its answers; refuses plaintext.

front      which outer address does what
intake     reads one sealed request under caps of size and time
ehbp       what of EHBP's heads, which travel in clear, gets in and out
tls        requests by the listener that ends TLS in here, where that is switched on; certificate: its key
plaintext  who may ask unsealed, where that is switched on: this machine's own programs
inside     runs the app inside for one opened request
inner      the opened request as the inner app's ASGI scope; the inner `Date`
answer     seals what the inner app sends, and decides when it leaves
events     whole server-sent events, padded
receipts   what an answer's asker may keep as proof, delivered with it
problems   what is said in plaintext when nothing could be opened
"""

from cloister.enclave.gateway.front import Gateway

__all__ = ["Gateway"]
