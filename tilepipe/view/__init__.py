"""Looking at results: a small read-only server on 127.0.0.1 and the page it serves."""
