"""Requests: messages, chat templates, options and sampling settings, checked."""
