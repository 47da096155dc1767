"""The web server: routes, streams, access control, limits, metrics and lifecycle.

Modules:
    access_log  Access log: a line for each request, without prompts, keys or what else a client chose.
    answering   Answering of a request: its events as one JSON object, or as server-sent events.
    app         The application: routes, and the gates before them.
    asgi        Types of ASGI, and answers of JSON in it.
    gates       Gates before the routes: name of the host, API key, type and size of a body.
    metrics     Metrics for Prometheus: requests, tokens, queue, and memory predicted beside measured.
    server      Server that listens while the model loads, and lets the running requests end.
    settings    Settings of a server, checked.
"""
