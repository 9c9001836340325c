"""Hosts any ASGI or WSGI app behind the gateway: in a process of its own, which has the app's packages and none of ours.

app          the front's side: starts the process, restarts it, and is the ASGI app that stands inside the gateway
words        what an app writes to its standard output, where its owner publishes that
egress       the front's side of where it may connect to
wire         what goes over the socket of one request
child        the process: confines itself, unpacks, imports the app, answers
confinement  its own view of files and network, where the kernel gives it one
filter       what a network namespace would not hold back
unpacking    code and wheels, from memory into memory
asgi, wsgi   the two kinds of app

`wire`, `child`, `confinement`, `filter`, `unpacking`, `asgi` and `wsgi` run beside somebody's app: they import the standard library
and each other.
"""
