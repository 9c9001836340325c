"""The app owner's side, on a machine that is theirs: the app's file, the sealed bundle, and its release to a verified enclave.

appfile       cloister.toml, read into frozen values; every fault with its line and a remedy
ignoring      .cloisterignore: what of a folder is not the app
archive       files as a tar, the same bytes for the same files
requirements  the locked packages, fetched as wheels and held against their hashes
package       all of it into one bundle, sealed under fresh keys
filekeys      those keys, in the owner's state folder
deployment    the launch config of one release; how many there were
secrets       the values of the secrets that an app names
provision     verify an enclave that waits, seal the release to it, sign it, hand it over
broker        hands the same over without its owner, to enclaves that verify: what it decides, and its looks at them
broker_state  a broker's root secret and keys, and the sealed records of what it may release
broker_log    its log, in which no line can be changed or left out unseen
template      what `cloister init` writes
"""
