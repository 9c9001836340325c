"""An app's life inside the enclave: waiting for its owner, opening, serving, expired.

life      the states, one after the other, and what stands at the door in each
waiting   evidence with a fresh nonce, and one release: nothing else is said or taken
opening   the bundle's ciphertext, into memory, checked against its manifest
inner     what serves: the built-in language model, or a Python app
joining   a replica's part in its key group: let in by a member, it lets others in
entrance  the door of such a replica
ration    how often evidence is made for whoever asks
clock     the host's clock, never behind the owner's word nor behind itself
"""
