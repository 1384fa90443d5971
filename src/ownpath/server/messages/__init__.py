"""Anthropic's ``/v1/messages``, translated into chat requests and back."""
