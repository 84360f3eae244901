"""The server: embeddings, search and ranked answers over HTTP, and a page for people."""
