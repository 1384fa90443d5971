"""OpenAI's ``/v1/responses``, translated into chat requests and back."""
